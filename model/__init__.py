"""The model: architecture, accounting and the attention operators."""
