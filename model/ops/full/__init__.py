"""Full causal attention over packed documents."""

from model.ops.full.api import BACKENDS, full_attention, full_decode

__all__ = ["BACKENDS", "full_attention", "full_decode"]
