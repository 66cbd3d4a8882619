"""Launches that are prepared once and then cost the host little more than the driver's own work.

`kernel[grid](...)` looks at every argument of every launch, which takes the host longer than a short kernel takes the GPU. Here all that
does not change from one call of a shape to the next is settled when the launch is prepared; what it is given each time are tensors.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

# Parameters whose alignment no kernel is compiled for: parts of tables, which begin anywhere.
TABLES = ("ENTRIES", "EDGES", "BEGIN", "END", "ENDS", "PIECE", "START", "LENGTH", "DOC_FIRST")

_compiled: dict[Hashable, Any] = {}


class Launch:
    """`kernel[grid](*tensors, *numbers, **constants, num_warps=warps)` on the current device and stream, tensors being given when called.

    `registers` is the most a thread may have (`maxnreg`), where more would leave room for fewer programs on a multiprocessor.
    `constants` are the kernel's last parameters, in their order. Tensors that are none of `TABLES` begin on 16 bytes; the first one's
    dtype, from which those of the others follow, and its device are the same in every call.

    The first of a kind goes through Triton, which compiles. Those after it call what was compiled: Triton compiles anew only for other
    constants and dtypes, and for integers that differ in being 1, in being multiples of 16 or in their width. Triton's own launch
    hooks are not called; the profilers of torch and CUDA see the launches.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], *numbers: int | float, warps: int, registers: int | None = None, **constants: Any
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._options = {**constants, "num_warps": warps, **({"maxnreg": registers} if registers else {})}
        self._untouched = (*numbers, *constants.values())
        self._compiled: Any = None
        self._device: int | None = None

    def __call__(self, *tensors: Any) -> None:
        compiled = self._compiled or self._find(tensors[0])
        if compiled is None:
            self._compile(tensors)
            return
        stream = driver.active.get_current_stream(self._device)
        hooks = None, None, None
        compiled.run(*self._grid, 1, stream, compiled.function, compiled.packed_metadata, *hooks, *tensors, *self._untouched)

    def _kind(self, first: Tensor) -> Hashable:
        return self._kernel.fn, first.device, first.dtype, *self._options.values(), *map(_specialized, self._numbers)

    def _find(self, first: Tensor) -> Any:
        self._device = first.device.index
        self._compiled = _compiled.get(self._kind(first))
        return self._compiled

    def _compile(self, tensors: tuple[Any, ...]) -> None:
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._options)
        if compiled is not None:  # none in Triton's interpreter, ever
            _compiled[self._kind(tensors[0])] = compiled


def _specialized(number: int | float) -> Hashable:
    """What of an argument that is no constant the compiled kernel depends on."""
    return float if isinstance(number, float) else (number == 1, number % 16 == 0, number.bit_length() < 32)


def is_aligned(x: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time, as far as Triton can tell: from strides that 16 divides."""
    return x.data_ptr() % 16 == 0 and _has_aligned_rows(x.stride())


@functools.lru_cache
def _has_aligned_rows(strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(stride % 16 == 0 for stride in strides[:-1])


def copied(x: Tensor) -> Tensor:
    """A copy, without gaps and aligned; `contiguous()` would leave a dense tensor where it lies."""
    return x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """Itself where it is, else a copy."""
    return x if is_aligned(x) else copied(x)
