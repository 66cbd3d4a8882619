"""Training: stages, the loop, the engine (the only door to DeepSpeed), checkpoints, metrics and evaluation."""
