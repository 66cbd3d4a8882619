"""Which documents a stage trains on, and how often: pools of documents, each an endless stream, and the rule that takes rows from them.

A *pool* is the documents of one source and one range of lengths. The pools of a run are the finest that the mixes of all its stages
tell apart, so a change of mix changes only how often rows are taken from each: every pool's stream goes on where it was. A run whose
stages all take everything has one pool, all documents. A row has documents of one pool alone.

Each row is taken from the pool that is furthest behind its share of the tokens since the mix began. Shares are integers, so that the
choice is the same on every machine.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic

import numpy as np

from configs.mapping import nearest
from configs.schema import ConfigError, MixConfig, Packing
from data.shards import DocumentTable
from data.stream import Piece, Place, Position, Progress, Row, RowStream, TokenStream, Visit

LONG = (8192, 32768, 131072)
"""Lengths in tokens from which on documents are counted as long, in reports and in a run's figures."""
EVERYTHING = "*"
"""Name of the pool of all sources and lengths."""
WHOLE = 2**32
"""The sum of shares."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Documents of a source (None: of all) of at least `low` and less than `high` tokens (None: of any length from `low` on)."""

    source: str | None
    low: int
    high: int | None
    documents: np.ndarray
    """Their numbers in the split, ascending: [pool documents] int64."""
    lengths: np.ndarray
    """Tokens of each, separators included: [pool documents] int64."""

    @property
    def name(self) -> str:
        """`books`, `books 8192-32767`, `* 32768-`; the same for the same pool of any run."""
        lengths = f" {self.low}-{'' if self.high is None else self.high - 1}" if self.low or self.high is not None else ""
        return (EVERYTHING if self.source is None else self.source) + lengths

    @property
    def tokens(self) -> int:
        """Tokens of all its documents."""
        return int(self.lengths.sum())


def partition(table: DocumentTable, mixes: Sequence[MixConfig]) -> list[Pool]:
    """The pools of a run whose stages have `mixes`: without empty ones, by source in the corpus's order, then by length."""
    edges = {0}
    for mix in mixes:
        edges |= {mix.min_document_tokens, *(bucket.min_tokens for bucket in mix.buckets)}
        edges |= {mix.max_document_tokens + 1} if mix.max_document_tokens else set()
    lows = sorted(edges)
    by_source = any(mix.sources or mix.temperature != 1 for mix in mixes)
    ranges = np.searchsorted(np.array(lows), table.lengths, side="right") - 1
    numbers = ranges + len(lows) * table.source_numbers if by_source else ranges
    order = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[order], np.arange(len(lows) * (len(table.sources) if by_source else 1) + 1))
    pools = []
    for number in range(len(bounds) - 1):
        documents = order[bounds[number] : bounds[number + 1]]
        source, at = divmod(number, len(lows))
        if len(documents):
            pools.append(
                Pool(
                    source=table.sources[source] if by_source else None,
                    low=lows[at],
                    high=lows[at + 1] if at + 1 < len(lows) else None,
                    documents=documents,
                    lengths=table.lengths if len(documents) == table.num_documents else table.lengths[documents],
                )
            )
    return pools


def shares(pools: Sequence[Pool], mix: MixConfig, table: DocumentTable) -> list[int]:
    """How many of every 2^32 training tokens come from each pool. Raises ConfigError where `mix` asks for what the corpus has not."""
    for index, source in enumerate(mix.sources):
        if source.name not in table.sources:
            near = nearest(source.name, table.sources)
            raise ConfigError(f"mix.sources.{index}.name={source.name}: no such source{near}; the corpus has {', '.join(table.sources)}")
    limits = [*(bucket.min_tokens for bucket in mix.buckets), mix.max_document_tokens + 1 if mix.max_document_tokens else math.inf]
    for index, (low, high) in enumerate(pairwise(limits)):
        if not any(_takes(mix, pool) and low <= pool.low < high for pool in pools):
            longest = max((int(pool.lengths.max()) for pool in pools if _of_sources(mix, pool)), default=0)
            below = f" and fewer than {high}" if high < math.inf else ""
            raise ConfigError(
                f"mix.buckets.{index}.min_tokens={low}: the bucket holds nothing: no document has as many tokens{below}, "
                f"the longest has {longest}"
            )
    sizes = [pool.tokens * _repeat(mix, pool) if _takes(mix, pool) else 0.0 for pool in pools]
    by_source: dict[str | None, float] = {}
    for pool, size in zip(pools, sizes, strict=True):
        by_source[pool.source] = by_source.get(pool.source, 0.0) + size
    for index, source in enumerate(mix.sources):
        if not by_source.get(source.name):
            raise ConfigError(f"mix.sources.{index}.name={source.name}: it has no document{_between(mix)}")
    if not any(sizes):
        key = "min_document_tokens" if mix.min_document_tokens else "max_document_tokens"
        raise ConfigError(f"mix.{key}={getattr(mix, key)}: no document is left; they have {_span(table)} tokens")
    asked = {source.name: source.weight or source.epochs * by_source[source.name] for source in mix.sources}
    given = asked if any(asked.values()) else {}
    largest = max(by_source.values())  # relative to it, no power overflows
    wanted = {
        name: given[name] if given and name is not None else (size / largest) ** (1 / mix.temperature)
        for name, size in by_source.items()
        if size
    }
    total = sum(wanted.values())
    return [
        max(1, round(WHOLE * wanted[pool.source] / total * size / by_source[pool.source])) if size else 0
        for pool, size in zip(pools, sizes, strict=True)
    ]


def _of_sources(mix: MixConfig, pool: Pool) -> bool:
    return not mix.sources or pool.source in {source.name for source in mix.sources}


def _takes(mix: MixConfig, pool: Pool) -> bool:
    """Whether the mix draws on a pool: pools do not reach over a limit of any mix, so their shortest length decides."""
    fits = pool.low >= mix.min_document_tokens and (not mix.max_document_tokens or pool.low <= mix.max_document_tokens)
    return fits and _of_sources(mix, pool)


def _repeat(mix: MixConfig, pool: Pool) -> float:
    return next((bucket.repeat for bucket in reversed(mix.buckets) if pool.low >= bucket.min_tokens), 1.0)


def _between(mix: MixConfig) -> str:
    least = [f" of at least {mix.min_document_tokens} tokens"] if mix.min_document_tokens else []
    most = [f" of at most {mix.max_document_tokens} tokens"] if mix.max_document_tokens else []
    return " and".join(least + most)


def _span(table: DocumentTable) -> str:
    return f"{table.lengths.min()} to {table.lengths.max()}"


@dataclass(frozen=True)
class PoolProgress(Generic[Place]):
    """A pool's place: what of its stream is visited, the tokens that have come of it, and how many of those under the present mix."""

    visited: Progress[Place]
    tokens: int = 0
    counted: int = 0


class MixedRows(Generic[Place]):
    """The endless sequence of rows of several streams by name, each with its share (of any whole) of the tokens; shares of 0 wait."""

    def __init__(self, streams: Mapping[str, RowStream[Place]], shares: Sequence[int], *, seq_len: int, packing: Packing) -> None:
        self.names, self.shares, self.seq_len, self.packing = list(streams), list(shares), seq_len, packing
        self._streams = list(streams.values())
        self._active = [number for number, share in enumerate(shares) if share]

    def beginning(self) -> list[PoolProgress[Place]]:
        """The progress before the first row."""
        return [PoolProgress(Progress(stream.beginning)) for stream in self._streams]

    def take(
        self, progress: Sequence[PoolProgress[Place]], num_rows: int
    ) -> tuple[list[tuple[int, Row[Place]]], list[PoolProgress[Place]]]:
        """The next `num_rows` rows, each with the number of its stream, and the progress of every stream after them."""
        after, taken = list(progress), list[tuple[int, Row[Place]]]()
        while len(taken) < num_rows:
            number, count = self._behind(after), num_rows - len(taken) if len(self._active) == 1 else 1
            place = after[number]
            rows, visited = self._streams[number].take(place.visited, count, self.seq_len, self.packing)
            tokens = sum(length for row in rows for _, length in row)
            after[number] = PoolProgress(visited, place.tokens + tokens, place.counted + tokens)
            taken += [(number, row) for row in rows]
        return taken, after

    def _behind(self, progress: Sequence[PoolProgress[Place]]) -> int:
        """The stream that, once there is a row more, is furthest behind its share; the first of several."""
        total = self.seq_len + sum(progress[number].counted for number in self._active)
        return max(self._active, key=lambda number: self.shares[number] * total - WHOLE * progress[number].counted)

    def to_state(self, progress: Sequence[PoolProgress[Place]]) -> dict[str, Any]:
        """Integers and names, by stream, fit for JSON; `share` is that of the mix under which `counted` was counted."""
        return {
            name: {
                **stream.place_to_state(place.visited.start),
                "views": [[view.seq_len, view.rows, view.packing.value] for view in place.visited.views],
                "tokens": place.tokens,
                "counted": place.counted,
                "share": share,
            }
            for name, stream, place, share in zip(self.names, self._streams, progress, self.shares, strict=True)
        }

    def from_state(self, state: dict[str, Any]) -> list[PoolProgress[Place]]:
        """The inverse; counting begins anew under another mix. Raises ConfigError where the run has other streams."""
        if list(state) != self.names:
            raise ConfigError(
                f"resume: the saved stream has documents in pools {', '.join(state)}, the mixes of this run make {', '.join(self.names)}; "
                "what a later stage tells apart (sources, lengths), some mix of the run it goes on from must have told apart"
            )
        same = [place["share"] for place in state.values()] == self.shares
        return [
            PoolProgress(
                Progress(
                    stream.place_from_state(place),
                    tuple(Visit(seq_len, rows, Packing(packing)) for seq_len, rows, packing in place["views"]),
                ),
                place["tokens"],
                place["counted"] if same else 0,
            )
            for stream, place in zip(self._streams, state.values(), strict=True)
        ]


class MixedStream(MixedRows[Position]):
    """The rows of a stage over a prepared corpus: its pools under the shares of its mix. Raises ConfigError for a mix that cannot be
    drawn."""

    def __init__(self, table: DocumentTable, mix: MixConfig, mixes: Sequence[MixConfig], *, seed: int, seq_len: int) -> None:
        self.pools = partition(table, mixes)
        self._tokens = {pool.name: TokenStream(pool.lengths, seed=seed, key=_key(pool)) for pool in self.pools}
        super().__init__(self._tokens, shares(self.pools, mix, table), seq_len=seq_len, packing=mix.packing)
        for number in self._active:
            pool = self.pools[number]
            if pool.tokens < seq_len and mix.packing is not Packing.SEPARATE:
                raise ConfigError(
                    f"seq_len={seq_len}: the documents of {describe(pool, table)} have {pool.tokens} tokens and "
                    f"fill no row; shorten the rows{'' if pool.name == EVERYTHING else ', or leave them out of the mix'}"
                )

    def pieces(self, number: int, row: Row[Position]) -> list[Piece]:
        """A row of pool `number` as pieces of the split's documents."""
        documents, stream = self.pools[number].documents, self._tokens[self.names[number]]
        return [Piece(int(documents[piece.document]), piece.start, piece.stop) for piece in stream.pieces(row)]

    def num_targets(self, rows: Sequence[tuple[int, Row[Position]]]) -> int:
        """Tokens of the rows that have a next one in their document."""
        tokens = sum(length for _, row in rows for _, length in row)
        return tokens - sum(self._tokens[self.names[number]].num_document_ends([row]) for number, row in rows)


def upgraded(state: dict[str, Any], epoch_tokens: int) -> dict[str, Any]:
    """The pools of a stream saved before there were mixes: one pool of `epoch_tokens`, epoch, offset and [seq_len, rows] beside them."""
    tokens = state["epoch"] * epoch_tokens + state["offset"] + sum(seq_len * rows for seq_len, rows in state["views"])
    views = [[seq_len, rows, Packing.CONCAT.value] for seq_len, rows in state["views"]]
    place = {"epoch": state["epoch"], "offset": state["offset"], "views": views, "tokens": tokens, "counted": tokens, "share": WHOLE}
    return {EVERYTHING: place}


def describe(pool: Pool, table: DocumentTable) -> str:
    """A pool in a sentence."""
    source = f"the {table.name} split" if pool.source is None else pool.source
    if not pool.low and pool.high is None:
        return source
    return f"{source} of {pool.low} tokens and more" if pool.high is None else f"{source} of {pool.low} to {pool.high - 1} tokens"


def _key(pool: Pool) -> tuple[int, ...]:
    """What tells a pool's order apart; the order of all documents is that of a stream without a key."""
    if pool.name == EVERYTHING:
        return ()
    return (number_of(pool.name),)


def number_of(name: str) -> int:
    """A number that tells the orders of streams of this name and of others apart."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class MixShare:
    """A pool in a mix: its share of the training tokens, and its epochs over a number of them."""

    name: str
    documents: int
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True, kw_only=True)
class MixReport:
    """What a mix will train on: its pools, the share of training tokens from documents of each length of LONG on, and of padding."""

    pools: tuple[MixShare, ...]
    long: dict[int, float]
    padding: float


def report(table: DocumentTable, mix: MixConfig, *, tokens: int, seq_len: int) -> MixReport:
    """The report of `tokens` training tokens in rows of `seq_len`, before any training. Raises ConfigError as training would.

    Padding is exact for separate rows, none for concat, and reckoned as none for best_fit, where it is a hundredth at most.
    """
    stream = MixedStream(table, mix, [mix], seed=0, seq_len=seq_len)
    drawn = [(pool, share / sum(stream.shares)) for pool, share in zip(stream.pools, stream.shares, strict=True) if share]
    long = {low: sum(share * int(pool.lengths[pool.lengths >= low].sum()) / pool.tokens for pool, share in drawn) for low in LONG}
    filled = 1.0  # tokens of rows for each token of a document
    if mix.packing is Packing.SEPARATE:
        filled = sum(share * int((-(-pool.lengths // seq_len)).sum()) * seq_len / pool.tokens for pool, share in drawn)
    pools = tuple(
        MixShare(
            name=pool.name,
            documents=len(pool.documents),
            tokens=pool.tokens,
            share=share,
            epochs=share * tokens / filled / pool.tokens,
        )
        for pool, share in drawn
    )
    return MixReport(pools=pools, long=long, padding=1 - 1 / filled)
