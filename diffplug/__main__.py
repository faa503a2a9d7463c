"""`python -m diffplug`: the command line."""

from __future__ import annotations

from diffplug.cli import app

if __name__ == "__main__":
    app()
