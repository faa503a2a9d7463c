"""Steering in a sampling loop of one's own, of any state: `steerer.crowd(groups=, steps=, seeds=)`."""
