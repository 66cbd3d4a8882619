"""Causal attention inside a sliding window, over packed documents."""

from model.ops.sliding.api import BACKENDS, sliding_attention

__all__ = ["BACKENDS", "sliding_attention"]
