"""Triton's interpreter made quick enough for tests.

It reduces and scans by any function but a sum or a maximum one element at a time in Python: the sort of 1,024 numbers, which reduces by
exclusive or, takes a second. Here the same functions act on whole slices of the axis.
"""

import numpy as np
from triton.runtime import interpreter


def _combined(op, left: list[np.ndarray], right: list[np.ndarray], dtypes) -> list[np.ndarray]:
    tensors = (op.to_tensor(x, dtype) for x, dtype in zip((*left, *right), (*dtypes, *dtypes)))
    result = op.combine_fn.fn(*tensors)
    return [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]


def reduce_slices(op: interpreter.ReduceOps, inputs: tuple) -> list:
    """In place of `ReduceOps.generic_reduce`: folds the axis from its first slice to its last."""
    dtypes = [x.dtype for x in inputs]
    slices = [np.moveaxis(x.handle.data, op.axis, 0) for x in inputs]
    total = [x[0] for x in slices]
    for i in range(1, len(slices[0])):
        total = _combined(op, total, [x[i] for x in slices], dtypes)
    if op.keep_dims:
        total = [np.expand_dims(x, op.axis) for x in total]
    return [op.to_tensor(x, dtype) for x, dtype in zip(total, dtypes)]


def scan_by_doubling(op: interpreter.ScanOps, inputs: tuple) -> list:
    """In place of `ScanOps.generic_scan`, which `associative` allows: after step n each place covers the 2**n before it."""
    dtypes = [x.dtype for x in inputs]
    covered = [np.moveaxis(x.handle.data, op.axis, 0) for x in inputs]
    place = np.arange(len(covered[0])).reshape(-1, *(1 for _ in covered[0].shape[1:]))
    reach = 1
    while reach < len(place):
        joined = _combined(op, [np.roll(x, reach, axis=0) for x in covered], covered, dtypes)
        covered = [np.where(place < reach, x, y) for x, y in zip(covered, joined)]
        reach *= 2
    return [op.to_tensor(np.moveaxis(x, 0, op.axis), dtype) for x, dtype in zip(covered, dtypes)]
