"""Preference tuning of few-step models: what a reward brings, and what it costs."""
