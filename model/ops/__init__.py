"""Attention operators: `full` (dense causal) and `moba` (mixture of block attention)."""
