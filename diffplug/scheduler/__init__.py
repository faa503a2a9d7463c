"""Schedulers of a pipeline: exchanged, or refused where they cannot work, with what pipelines ask of them."""
