"""Launches that find their compiled kernel by themselves: Triton's own look-up costs the host more than a short kernel costs the GPU."""

from typing import Any

from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, int], *args: Any, warps: int, **constants: Any) -> None:
    """Runs `kernel[grid](*args, **constants, num_warps=warps)` on the current device and stream.

    `constants` are the kernel's last parameters, in their order. The first launch of a kind goes through Triton and compiles.
    """
    first = next(arg for arg in args if isinstance(arg, Tensor))
    key = (kernel.fn, warps, first.device, *constants.values(), *map(_specialisation, args))
    compiled = _compiled.get(key)  # none in Triton's interpreter, ever
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants, num_warps=warps)
    else:
        compiled[(*grid, 1)](*args, *constants.values())


def _specialisation(arg: Any) -> Any:
    """What Triton compiles for: a tensor's dtype and whether it begins on 16 bytes, an integer's width and whether 1 or 16 divides it."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg < 1 << 31
    return getattr(arg, "block_shape", None) and (*arg.block_shape, arg.base.dtype)
