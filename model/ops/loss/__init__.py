"""Cross-entropy of a linear head, without its logits."""

from model.ops.loss.api import BACKENDS, IGNORE, linear_cross_entropy, refusal

__all__ = ["BACKENDS", "IGNORE", "linear_cross_entropy", "refusal"]
