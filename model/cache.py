"""What cached generation keeps of one layer: keys as attention reads them, values and, in a MoBA layer, the means of whole
blocks; where keys are convolved, the last raw ones too."""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.layers import LayerAttention
from model.ops.moba import update_block_means


class Mark(NamedTuple):
    """A place that a cache can come back to."""

    length: int
    block_means: Tensor
    raw_keys: Tensor
    window: tuple[Tensor, Tensor] | None
    """Keys and values of a sliding layer, whose places later tokens take."""


class LayerCache:
    """Keys and values of one sequence in one layer; of a sliding layer those inside the window alone, in no order."""

    def __init__(self, attention: LayerAttention, capacity: int, empty: Tensor) -> None:
        """Room for `capacity` tokens, with the heads, width, dtype and device of `empty` `[0, Hkv, D]`."""
        self.attention = attention
        self.length = 0
        """Tokens of the sequence so far."""
        self.block_means = empty.to(torch.promote_types(empty.dtype, torch.float32))
        """Mean key of each whole block, `[length // block_size, Hkv, D]` in fp32 at least; stays empty but in a MoBA layer."""
        self.raw_keys = empty.flatten(1)
        """What the key convolution reads before the next token, `[at most width - 1, Hkv * D]`; stays empty without one."""
        room = min(capacity, attention.window) if attention.kind == "sliding" else capacity
        self._keys = empty.new_empty(room, *empty.shape[1:])
        self._values = empty.new_empty(room, *empty.shape[1:])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens: keys and values `[n, Hkv, D]`."""
        self.length += len(k)
        room = len(self._keys)
        place = torch.arange(max(self.length - room, self.length - len(k)), self.length, device=k.device)
        self._keys[place % room] = k[-room:]
        self._values[place % room] = v[-room:]
        if self.attention.kind == "moba":
            self.block_means = update_block_means(self.block_means, self.keys, block_size=self.attention.block_size)

    @property
    def keys(self) -> Tensor:
        """`[length, Hkv, D]`; in a sliding layer at most `window` of them."""
        return self._keys[: self.length]

    @property
    def values(self) -> Tensor:
        """`[length, Hkv, D]`; in a sliding layer at most `window` of them."""
        return self._values[: self.length]

    def mark(self) -> Mark:
        """The present place: little but in a sliding layer, since later tokens are written behind it."""
        window = (self._keys.clone(), self._values.clone()) if self.attention.kind == "sliding" else None
        return Mark(self.length, self.block_means, self.raw_keys, window)

    def rewind(self, mark: Mark) -> None:
        """Forget the tokens since `mark`."""
        self.length, self.block_means, self.raw_keys, window = mark
        if window is not None:
            self._keys.copy_(window[0])
            self._values.copy_(window[1])
