"""Attention operators: `full` (dense causal), `moba` (mixture of block attention) and `sliding` (dense inside a window)."""
