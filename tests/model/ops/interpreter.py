"""Functions of Triton's interpreter as tests need them.

It sorts by a network of reductions and scans element by element, all in Python: a second for 1,024 numbers. Its products are a BLAS's, which
may add a row up in another order at another place of the same matrix (OpenBLAS with AVX2), as no GPU does.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def sort(x: tl.tensor) -> tl.tensor:
    """In place of `tl.sort` of one dimension."""
    return tl.tensor(TensorHandle(np.sort(x.handle.data), x.handle.dtype), x.type)


def scan_by_doubling(op: interpreter.ScanOps, inputs: list[tl.tensor]) -> list[tl.tensor]:
    """In place of `ScanOps.generic_scan` of one dimension: after step n each place has joined the 2**n up to it."""
    place, reach = np.arange(inputs[0].numel.value), 1
    while reach < len(place):
        before = (op.to_tensor(np.roll(x.handle.data, reach), x.dtype) for x in inputs)
        joined = op.combine_fn.fn(*before, *inputs)
        inputs = [op.to_tensor(np.where(place < reach, x.handle.data, y.handle.data), x.dtype) for x, y in zip(inputs, joined)]
        reach *= 2
    return inputs


def dot_by_row(
    builder: interpreter.InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    c: TensorHandle,
    input_precision: object,
    most_imprecise: object,
) -> TensorHandle:
    """In place of `InterpreterBuilder.create_dot`: each row is the same wherever it stands. Products and sums in fp64, rounded once."""
    product = np.matmul(a.data, b.data, dtype=np.float64) + c.data
    return TensorHandle(product.astype(c.data.dtype), c.dtype.scalar)
