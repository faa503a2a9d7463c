"""`python -m diffplug ...` is the command line."""

from diffplug.cli.main import app

if __name__ == "__main__":
    app()
