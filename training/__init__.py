"""Tuned few-step models: rollout, score, select, objective, times a tuner. One file each."""

if __name__ != "diffplug.training":
    raise ImportError(f"import this package as diffplug.training, not as {__name__}")
