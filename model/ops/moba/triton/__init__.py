"""MoBA kernels in Triton: gate, deterministic index, forward and backward, in memory linear in T.

Nothing is imported here: `limits` alone is read where Triton may be missing, and `operator.moba_triton` is the door to the rest.
"""
