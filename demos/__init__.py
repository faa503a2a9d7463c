"""Things to look at: comparisons, contact sheets, the page and the batch engine."""

if __name__ != "diffplug.demos":
    raise ImportError(f"import this package as diffplug.demos, not as {__name__}")
