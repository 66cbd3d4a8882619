"""What cached generation keeps of one layer: rotated keys, values and, in a MoBA layer, the means of whole blocks."""

import torch
from torch import Tensor

from configs.layers import LayerAttention
from model.ops.moba import update_block_means


class LayerCache:
    """Keys and values of one sequence in one layer."""

    def __init__(self, attention: LayerAttention, capacity: int, empty: Tensor) -> None:
        """Room for `capacity` tokens, with the heads, width, dtype and device of `empty` `[0, Hkv, D]`."""
        self.attention = attention
        self.length = 0
        self.block_means = empty.to(torch.promote_types(empty.dtype, torch.float32))
        """Mean key of each whole block, `[length // block_size, Hkv, D]` in fp32 at least; stays empty in a full layer."""
        self._keys = empty.new_empty(capacity, *empty.shape[1:])
        self._values = empty.new_empty(capacity, *empty.shape[1:])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens: rotated keys and values `[n, Hkv, D]`."""
        start, self.length = self.length, self.length + len(k)
        self._keys[start : self.length] = k
        self._values[start : self.length] = v
        if self.attention.kind == "moba":
            self.block_means = update_block_means(self.block_means, self.keys, block_size=self.attention.block_size)

    @property
    def keys(self) -> Tensor:
        """`[length, Hkv, D]`."""
        return self._keys[: self.length]

    @property
    def values(self) -> Tensor:
        """`[length, Hkv, D]`."""
        return self._values[: self.length]
