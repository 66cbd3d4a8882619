"""Launches that find their compiled kernel by themselves: Triton's own look-up costs the host more than a short kernel costs the GPU."""

from typing import Any

# Parameters whose alignment no kernel is compiled for: parts of tables, which begin anywhere.
TABLES = ("ENTRIES", "EDGES", "BEGIN", "END", "ENDS", "PIECE", "START", "LENGTH", "DOC_FIRST")

_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 4096  # numbers of blocks and lists differ from batch to batch of packed documents


def launch(kernel: Any, grid: tuple[int, int], *args: Any, warps: int, **constants: Any) -> None:
    """Runs `kernel[grid](*args, **constants, num_warps=warps)` on the current device and stream.

    `constants` are the kernel's last parameters, in their order. Tensors that are none of `TABLES` begin on 16 bytes, and their dtypes
    follow from that of the first argument. The first launch of a kind goes through Triton and compiles.
    """
    numbers = [arg for arg in args if isinstance(arg, int | float)]
    key = (kernel.fn, args[0].device, args[0].dtype, warps, *numbers, *constants.values())
    compiled = _compiled.get(key)  # none in Triton's interpreter, ever
    if compiled is not None:
        compiled[(*grid, 1)](*args, *constants.values())
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = kernel[grid](*args, **constants, num_warps=warps)
