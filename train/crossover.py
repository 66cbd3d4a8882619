"""From which context length on a MoBA layer costs less than full attention: measured where it was, else counted in FLOPs."""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from configs.layers import LayerAttention
from configs.schema import ModelConfig
from model.accounting import training_flops
from model.memory import reach

MEASURED = Path(__file__).resolve().parent.parent / "model" / "ops" / "moba" / "measured.yaml"


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """MoBA costs less than full attention from `length` tokens of one document on.

    `is_bound`: it did so at every length measured, of which `length` is the shortest.
    """

    attention: LayerAttention
    length: int
    is_bound: bool
    source: str

    def __str__(self) -> str:
        if self.is_bound:
            least = f"{reach(self.attention):,} tokens, up to which it is full attention"
            return f"{self.attention} from somewhere between {least}, and {self.length:,}"
        return f"{self.attention} from about {self.length:,} tokens"


def crossover(config: ModelConfig, attention: LayerAttention, *, gpu: str) -> Crossover | None:
    """Of one MoBA setting for a model's shapes on a GPU, from `MEASURED` where that setting and head dimension are in it.

    Times between two measured lengths are interpolated on logarithmic scales. None where MoBA lost at every length measured.
    """
    for table in yaml.safe_load(MEASURED.read_text()):
        if table["gpu"] != gpu or table["head_dim"] != config.head_dim:
            continue
        for row in table["moba"]:
            if (row["block_size"], row["topk"]) == (attention.block_size, attention.topk):
                return _from_times(attention, table, row["milliseconds"])
    return _from_flops(config, attention)


def _from_times(attention: LayerAttention, table: dict[str, Any], moba: dict[int, float]) -> Crossover | None:
    lengths = sorted(moba.keys() & table["dense"].keys())
    gains = [math.log(table["dense"][length] / moba[length]) for length in lengths]
    source = f"measured on one {table['gpu']}, {table['date']}, forward + backward, {', '.join(f'{length:,}' for length in lengths)} tokens"
    if gains[0] > 0:
        return Crossover(attention=attention, length=lengths[0], is_bound=True, source=source)
    for (short, loss), (long, gain) in itertools.pairwise(zip(lengths, gains, strict=True)):
        if gain > 0:
            share = loss / (loss - gain)
            length = round(math.exp(math.log(short) + share * math.log(long / short)))
            return Crossover(attention=attention, length=length, is_bound=False, source=source)
    return None


def _from_flops(config: ModelConfig, attention: LayerAttention) -> Crossover:
    """The shortest document of which MoBA, its gate included, executes fewer FLOPs."""
    one = replace(config, num_layers=1)

    def saves(length: int) -> bool:
        flops = training_flops(one, (attention,), [length])
        return flops.executed < flops.dense_equivalent

    low, high = reach(attention), 2 * reach(attention)  # up to low it is full attention
    while not saves(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return Crossover(attention=attention, length=high, is_bound=False, source="FLOPs alone: this setting was not measured on this GPU")
