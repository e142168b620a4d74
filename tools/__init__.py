"""Command-line tools; each is run as `python -m zoo.tools.NAME`."""
