"""The `triton` backend: MoBA for one GPU, forward and backward, deterministic."""

from model.ops.moba.triton.operator import moba_triton

__all__ = ["moba_triton"]
