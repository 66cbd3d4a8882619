"""Two functions of Triton's interpreter made quick enough for tests.

It sorts by a network of reductions and scans element by element, all in Python: a second for 1,024 numbers.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def sort(x: tl.tensor) -> tl.tensor:
    """In place of `tl.sort` of one dimension."""
    return tl.tensor(interpreter.TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)


def scan_by_doubling(op: interpreter.ScanOps, inputs: list[tl.tensor]) -> list[tl.tensor]:
    """In place of `ScanOps.generic_scan` of one dimension: after step n each place has joined the 2**n up to it."""
    place, reach = np.arange(inputs[0].numel.value), 1
    while reach < len(place):
        before = (op.to_tensor(np.roll(x.handle.data, reach), x.dtype) for x in inputs)
        joined = op.combine_fn.fn(*before, *inputs)
        inputs = [op.to_tensor(np.where(place < reach, x.handle.data, y.handle.data), x.dtype) for x, y in zip(inputs, joined)]
        reach *= 2
    return inputs
