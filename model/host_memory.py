"""Inputs of layers in host memory between the forward and the backward pass, copied while the layers compute."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Wait = Callable[[], None]
"""Makes what is computed next on the current stream wait for a copy."""


@dataclass(eq=False, kw_only=True)
class _Kept:
    """A tensor in host memory, as long as a graph holds this."""

    values: Tensor
    """In a slot, in the tensor's own dtype and shape."""
    device: torch.device
    before: "Callable[[], _Kept | None]"
    """What was kept before it, and is read after it."""
    fetched: tuple[Tensor, Wait] | None = None
    """On its way back to the device."""


class HostMemory:
    """Slots of exactly the size that is asked for, used again from step to step: on a CUDA machine page-locked, with copies on a stream
    of their own. On a CPU the same copies are made at once."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._last: Callable[[], _Kept | None] = lambda: None
        self._leaving: tuple[Tensor, Wait] | None = None
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def keeping(self, x: Tensor) -> Iterator[None]:
        """Inside it, what autograd saves of `x` goes to host memory, and is back on x's device when the backward pass reads it."""

        address, shape = x.data_ptr(), x.shape  # the graph holds the hooks: with x in them, they would hold x

        def pack(saved: Tensor) -> Tensor | _Kept:
            return self._keep(saved) if (saved.data_ptr(), saved.shape) == (address, shape) else saved

        def unpack(packed: Tensor | _Kept) -> Tensor:
            return self._fetch(packed) if isinstance(packed, _Kept) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def settle(self) -> None:
        """Lets go of the device's memory of what was kept last: what is computed from here on may overwrite it, once it is copied."""
        if self._leaving:
            self._leaving[1]()
            self._leaving = None

    def _keep(self, x: Tensor) -> _Kept:
        slot = self._take(x.nbytes, x.device)
        kept = _Kept(values=slot[: x.nbytes].view(x.dtype).view(x.shape), device=x.device, before=self._last)
        weakref.finalize(kept, self._free.append, slot).atexit = False
        self._last = weakref.ref(kept)
        self._leaving = x, self._copy(x, kept.values)
        return kept

    def _fetch(self, kept: _Kept) -> Tensor:
        self.settle()
        self._send(kept)
        assert kept.fetched
        (x, wait), kept.fetched = kept.fetched, None
        wait()
        if (following := kept.before()) is not None:  # it travels while this one's layer is computed
            self._send(following)
        return x

    def _send(self, kept: _Kept) -> None:
        if kept.fetched is None:
            x = torch.empty(kept.values.shape, dtype=kept.values.dtype, device=kept.device)
            kept.fetched = x, self._copy(kept.values, x)

    def _copy(self, source: Tensor, target: Tensor) -> Wait:
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            target.copy_(source)
            return lambda: None
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # which computes the source, or still reads what lay in the target
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied = self._stream.record_event()
        return lambda: torch.cuda.current_stream(device).wait_event(copied)

    def _take(self, size: int, device: torch.device) -> Tensor:
        """A slot of at least `size` bytes; those that are too small for now are given back to the machine."""
        fitting = [index for index, slot in enumerate(self._free) if len(slot) >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
        self._free.clear()
        return host_bytes(size, device)


def host_bytes(size: int, device: torch.device) -> Tensor:
    """`size` bytes of host memory, uint8 `[size]`, page-locked where a CUDA `device` is to copy from and to them by itself.

    PyTorch's own page-locked memory comes in powers of two: 8 GiB for the 5 GiB of a row of 1M tokens.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
        page_locked.add(size)
        weakref.finalize(memory, _unlock, runtime, address, size)
    return memory


def _unlock(runtime: Any, address: int, size: int) -> None:
    runtime.cudaHostUnregister(address)
    page_locked.add(-size)


@dataclass
class PageLocked:
    """Bytes that `host_bytes` has page-locked in this process; PyTorch counts its own alone."""

    now: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        """Counts `size` more; less, where it is negative."""
        self.now += size
        self.peak = max(self.peak, self.now)


page_locked = PageLocked()
