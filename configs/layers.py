"""Rules that give each layer its attention, `last 3 full, rest moba(512, 3)`, and what it keeps for the backward pass, `last 4 full,
rest offload`; and lists of layers: `last 3, layers 0 5`.

Grammar: clauses separated by commas, each `SELECTOR KIND`, the first clause that matches a layer decides.
Selectors: `all`, `rest`, `first N`, `last N`, `every N` (layers N-1, 2N-1, ...), `layers I J ...` (counted from 0);
a bare kind means `all`. Kinds of attention: `full`, `moba` (block size and top-k from the config), `moba(B, K)` and `sliding(W)`;
of what is kept: `none`, `selective`, `full` and `offload`. A list of layers has selectors alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_NUMBERS: dict[str, tuple[str, ...]] = {"full": (), "moba": ("block_size", "topk"), "sliding": ("window",)}
KINDS = tuple(_NUMBERS)
MOST_POSITIONS = (1 << 31) - 1
"""Tokens and cu_seqlens are int32."""
ACTIVATIONS = ("none", "selective", "full", "offload")
"""What a layer keeps for the backward pass, from most to least; the words say what is computed again (`model.activations`)."""
_SELECTORS = "all, rest, first N, last N, every N, layers I J ..."
_SHAPES = "full, moba, moba(BLOCK_SIZE, TOPK), sliding(WINDOW)"


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Attention of one layer: `full`; `moba` with its block size (tokens) and top-k (blocks, the own one included); or
    `sliding`, where each query sees the last `window` tokens of its document, itself included."""

    kind: str
    block_size: int = 0
    topk: int = 0
    window: int = 0

    def __str__(self) -> str:
        numbers = ", ".join(str(getattr(self, name)) for name in _NUMBERS[self.kind])
        return f"{self.kind}({numbers})" if numbers else self.kind


def parse_rule(rule: str, *, num_layers: int | None, block_size: int, topk: int) -> tuple[LayerAttention, ...]:
    """The attention of each layer; with `num_layers=None` only the grammar is checked and the result is empty.

    Raises ValueError for a clause that cannot be read or names no layer, and for a layer that no clause names.
    """
    clauses = [_parse_clause(text.strip(), block_size, topk) for text in re.split(r",(?![^(]*\))", rule)]
    return _assign(clauses, num_layers, "'rest full' or 'rest moba'")


def parse_activation(rule: str, *, num_layers: int | None) -> tuple[str, ...]:
    """What each layer keeps, one of `ACTIVATIONS`; errors and `num_layers=None` as in `parse_rule`."""
    return _assign([_parse_kept(text.strip()) for text in rule.split(",")], num_layers, "'rest none' or 'rest full'")


def _assign(clauses: Sequence[tuple[list[str], T]], num_layers: int | None, remedy: str) -> tuple[T, ...]:
    """What the first clause that names a layer gives to it; `remedy` are clauses for layers that none names."""
    if num_layers is None:
        return ()
    chosen: dict[int, T] = {}
    for words, given in clauses:
        chosen.update(dict.fromkeys(_free(words, num_layers, chosen, f"{' '.join(words)} {given}"), given))
    missing = [layer for layer in range(num_layers) if layer not in chosen]
    if missing:
        raise ValueError(f"layers {missing} of {num_layers} are named by no clause; add {remedy}")
    return tuple(chosen[layer] for layer in range(num_layers))


def parse_layers(text: str, *, num_layers: int | None) -> frozenset[int]:
    """The layers that a list such as `every 2` or `last 3, layers 0 5` names; none where it is empty.

    With `num_layers=None` only the grammar is checked. Raises ValueError for a selector that cannot be read or names no layer
    that those before it have not.
    """
    selectors = [_parse_selector(part.strip()) for part in text.split(",")] if text.strip() else []
    if num_layers is None:
        return frozenset()
    chosen: dict[int, None] = {}
    for words in selectors:
        chosen.update(dict.fromkeys(_free(words, num_layers, chosen, " ".join(words))))
    return frozenset(chosen)


def _free(words: list[str], num_layers: int, chosen: Mapping[int, object], said: str) -> list[int]:
    """The selected layers that are not chosen yet. Raises ValueError where there are none."""
    selected = _select(words, num_layers)
    free = [layer for layer in selected if layer not in chosen]
    if not free:
        remedy = f"all {len(selected)} that it selects are named before it; narrow what stands there, or leave this out"
        if not selected:  # `every N` alone can come to none
            remedy = f"{words[-1]} is more than there are; lower it, or leave this out"
        raise ValueError(f"'{said}' names no layer that is still free among {num_layers}: {remedy}")
    return free


def _parse_clause(text: str, block_size: int, topk: int) -> tuple[list[str], LayerAttention]:
    match = re.match(r"^(?P<selector>.*?)\s*(?P<kind>[a-z]+)(\((?P<numbers>\s*\d+\s*(,\s*\d+\s*)*)\))?$", text, re.IGNORECASE)
    kind = match["kind"].lower() if match else ""
    if match is None or kind not in KINDS:
        raise ValueError(f"'{text}' does not end in an attention kind; accepted: {_SHAPES}")
    words = _parse_selector(match["selector"] or "all")
    names = _NUMBERS[kind]
    numbers = [int(number) for number in match["numbers"].split(",")] if match["numbers"] else []
    if kind == "moba" and not numbers:
        numbers = [block_size, topk]
    if len(numbers) != len(names):
        raise ValueError(f"'{text}': {kind} takes {'(' + ', '.join(names) + ')' if names else 'no numbers'}")
    if 0 in numbers:
        raise ValueError(f"'{text}': {' and '.join(names)} must be at least 1")
    if max(numbers, default=0) > MOST_POSITIONS:
        raise ValueError(f"'{text}': {' and '.join(names)} must be at most {MOST_POSITIONS}")
    return words, LayerAttention(kind=kind, **dict(zip(names, numbers)))


def _parse_kept(text: str) -> tuple[list[str], str]:
    *words, kind = text.lower().split() or [""]
    if kind not in ACTIVATIONS:
        raise ValueError(f"'{text}' does not end in what a layer keeps; accepted: {', '.join(ACTIVATIONS)}")
    return _parse_selector(" ".join(words) or "all"), kind


def _parse_selector(text: str) -> list[str]:
    words = text.lower().split()
    counts_ok = all(word.isdigit() for word in words[1:])
    single = words in (["all"], ["rest"])
    counted = words[:1] in (["first"], ["last"], ["every"]) and len(words) == 2 and counts_ok and int(words[1]) > 0
    listed = words[:1] == ["layers"] and len(words) >= 2 and counts_ok
    if not (single or counted or listed):
        raise ValueError(f"'{text}' does not select layers; accepted: {_SELECTORS}")
    return words


def _select(words: list[str], num_layers: int) -> list[int]:
    layers = list(range(num_layers))
    if words[0] in ("all", "rest"):
        return layers
    numbers = [int(word) for word in words[1:]]
    if words[0] in ("first", "last") and numbers[0] > num_layers:
        raise ValueError(f"'{words[0]} {numbers[0]}' is more layers than the {num_layers} of the model")
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
