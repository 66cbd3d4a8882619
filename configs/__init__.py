"""Configuration: what a run is (`schema`), how it is read (`registry`), and what must hold across it (`checks`)."""
