"""The doors of the framework: `python -m scripts.NAME`."""
