"""The rule that gives each layer its attention: `last 3 full, rest moba(512, 3)`.

Grammar: clauses separated by commas, each `SELECTOR KIND`, the first clause that matches a layer decides.
Selectors: `all`, `rest`, `first N`, `last N`, `every N` (layers N-1, 2N-1, ...), `layers I J ...` (counted from 0);
a bare kind means `all`. Kinds: `full`, `moba` (block size and top-k from the config) and `moba(B, K)`.
"""

import re
from dataclasses import dataclass

KINDS = ("full", "moba")
_SELECTORS = "all, rest, first N, last N, every N, layers I J ..."
_KIND = re.compile(r"^(?P<kind>full|moba)(\(\s*(?P<block>\d+)\s*,\s*(?P<topk>\d+)\s*\))?$")


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Attention of one layer: `full`, or `moba` with its block size (tokens) and top-k (blocks, the own one included)."""

    kind: str
    block_size: int = 0
    topk: int = 0

    def __str__(self) -> str:
        return "full" if self.kind == "full" else f"moba({self.block_size}, {self.topk})"


def parse_rule(rule: str, *, num_layers: int | None, block_size: int, topk: int) -> tuple[LayerAttention, ...]:
    """The attention of each layer; with `num_layers=None` only the grammar is checked and the result is empty.

    Raises ValueError for a clause that cannot be read or names no layer, and for a layer that no clause names.
    """
    clauses = [_parse_clause(text.strip(), block_size, topk) for text in re.split(r",(?![^(]*\))", rule)]
    if num_layers is None:
        return ()
    chosen: dict[int, LayerAttention] = {}
    for words, attention in clauses:
        selected = _select(words, num_layers)
        taken = [layer for layer in selected if layer not in chosen]
        if not taken:
            raise ValueError(f"'{' '.join(words)} {attention}' names no layer that is still free among {num_layers}")
        chosen.update(dict.fromkeys(taken, attention))
    missing = [layer for layer in range(num_layers) if layer not in chosen]
    if missing:
        raise ValueError(f"layers {missing} of {num_layers} are named by no clause; add 'rest full' or 'rest moba'")
    return tuple(chosen[layer] for layer in range(num_layers))


def _parse_clause(text: str, block_size: int, topk: int) -> tuple[list[str], LayerAttention]:
    match = re.match(r"^(?P<selector>.*?)\s*(?P<kind>[a-z]+(\([^)]*\))?)$", text, re.IGNORECASE)
    kind = _KIND.match(match["kind"].lower()) if match else None
    if match is None or kind is None:
        raise ValueError(f"'{text}' does not end in an attention kind; accepted: full, moba, moba(BLOCK_SIZE, TOPK)")
    words = match["selector"].lower().split() or ["all"]
    counts_ok = all(word.isdigit() for word in words[1:])
    single = words[0] in ("all", "rest") and len(words) == 1
    counted = words[0] in ("first", "last", "every") and len(words) == 2 and counts_ok and int(words[1]) > 0
    listed = words[0] == "layers" and len(words) >= 2 and counts_ok
    if not (single or counted or listed):
        raise ValueError(f"'{match['selector']}' does not select layers; accepted: {_SELECTORS}")
    if kind["kind"] == "full":
        if kind["block"]:
            raise ValueError(f"'{match['kind']}': full attention takes no numbers")
        return words, LayerAttention(kind="full")
    block_size, topk = int(kind["block"] or block_size), int(kind["topk"] or topk)
    if block_size < 1 or topk < 1:
        raise ValueError(f"'{match['kind']}': block size and top-k must be at least 1")
    return words, LayerAttention(kind="moba", block_size=block_size, topk=topk)


def _select(words: list[str], num_layers: int) -> list[int]:
    layers = list(range(num_layers))
    if words[0] in ("all", "rest"):
        return layers
    numbers = [int(word) for word in words[1:]]
    if words[0] == "first":
        return layers[: numbers[0]]
    if words[0] == "last":
        return layers[-numbers[0] :]
    if words[0] == "every":
        return layers[numbers[0] - 1 :: numbers[0]]
    outside = [number for number in numbers if number >= num_layers]
    if outside:
        raise ValueError(f"layers {outside} do not exist; the model has layers 0..{num_layers - 1}")
    return numbers
