"""What cached generation keeps of one layer: rotated keys, values and, in a MoBA layer, the means of whole blocks."""

from torch import Tensor

from configs.layers import LayerAttention
from model.ops.moba import update_block_means


class LayerCache:
    """Keys and values of one sequence in one layer; room for `capacity` tokens is taken at the first `append`."""

    def __init__(self, attention: LayerAttention, capacity: int) -> None:
        self.attention = attention
        self.capacity = capacity
        self.length = 0
        self.block_means: Tensor | None = None
        """Mean key of each whole block, `[length // block_size, Hkv, D]` in fp32 at least; None in a full layer."""
        self._keys = self._values = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens: rotated keys and values `[n, Hkv, D]`."""
        if self._keys is None:
            self._keys, self._values = (k.new_empty(self.capacity, *k.shape[1:]) for _ in range(2))
        start, self.length = self.length, self.length + len(k)
        self._keys[start : self.length] = k
        self._values[start : self.length] = v
        if self.attention.kind == "moba":
            self.block_means = update_block_means(self.block_means, self.keys, block_size=self.attention.block_size)

    @property
    def keys(self) -> Tensor:
        """`[length, Hkv, D]`, after the first append."""
        return self._keys[: self.length]

    @property
    def values(self) -> Tensor:
        """`[length, Hkv, D]`, after the first append."""
        return self._values[: self.length]
