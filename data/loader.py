"""The door to training data: the steps of one rank, and the held-out rows.

Over a prepared corpus an optimizer step is the next rows_per_step rows of the stream, the same whatever the number of ranks. Micro-batch
m of the step holds rows [m * micro_batch_rows, (m + 1) * micro_batch_rows), and belongs to rank m % world_size. Over a streamed corpus
each rank has rows of its own, of its share of the documents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.mapping import first_difference
from configs.schema import ConfigError, DataConfig, MixConfig
from data.batch import IGNORE, PADDING, Batch, Documents, PieceOrigin, pack
from data.documents import Share
from data.mix import LONG, MixedStream, upgraded
from data.shards import Corpus, DocumentTable
from data.stream import Position, Progress, Row, TokenStream
from data.streaming import DocumentList, LiveRows, StreamedCorpus

_HELDOUT_SEED = 0  # held-out rows are the same in every run


OpenCorpus = Corpus | StreamedCorpus
"""What `open_corpus` gives."""
Gather = Callable[[Any], list[Any]]
"""The value of every rank, in rank order."""


class Loader(ABC):
    """A rank's micro-batches, step by step, without end. Made by `build_loader`. Its state is the same on every rank."""

    _table: Documents
    """The documents of the last step's rows, by the numbers that batches have."""

    def __init__(self, *, seq_len: int, rows_per_step: int, micro_batch_rows: int, rank: int, world_size: int) -> None:
        self.seq_len, self.rows_per_step, self.micro_batch_rows = seq_len, rows_per_step, micro_batch_rows
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    @abstractmethod
    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step: rows_per_step / (world_size * micro_batch_rows) of them."""

    @abstractmethod
    def epochs(self) -> dict[str, float]:
        """How often the documents of each pool or source have been seen by now, by its name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is visited, and of which stream, fit for JSON and the same on every rank. Every rank must ask for it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises ConfigError where it means nothing here."""

    @abstractmethod
    def labels(self, batches: Sequence[Batch]) -> list[int] | list[str]:
        """What the last step's `batches` hold: the numbers of documents in the prepared split, or their names in streamed sources."""

    def count(self, batches: Sequence[Batch]) -> dict[str, int]:
        """What rows of the last step hold: tokens of each source (`source/NAME`), tokens of documents from each length on (`length/0`,
        `length/8192` and so on up to the next), and `padding`. The keys are the same for all batches, so that counts of ranks can be
        summed.
        """
        documents = np.array([origin.document for batch in batches for origin in batch.documents], np.int64)
        tokens = np.concatenate([np.diff(batch.cu_seqlens.numpy()) for batch in batches]).astype(np.int64)
        real = documents != PADDING
        sources = self._table.source_numbers[documents[real]]
        classes = np.searchsorted(LONG, self._table.lengths[documents[real]], side="right")
        by_source = np.bincount(sources, tokens[real], len(self._table.sources))
        by_length = np.bincount(classes, tokens[real], len(LONG) + 1)
        counts = {f"source/{name}": int(number) for name, number in zip(self._table.sources, by_source, strict=True)}
        counts |= {f"length/{low}": int(number) for low, number in zip((0, *LONG), by_length, strict=True)}
        return counts | {"padding": int(tokens[~real].sum())}


class PreparedLoader(Loader):
    """Over a prepared corpus: every rank walks the whole stream and packs its own rows.

    `epoch_tokens` is the number of tokens of the split, `progress` what the steps before the next one have visited, by pool (`data.mix`).
    """

    def __init__(self, table: DocumentTable, stream: MixedStream, fingerprint: int, *, seed: int, **shape: int) -> None:
        super().__init__(**shape)
        self.epoch_tokens = table.num_tokens
        self.progress = stream.beginning()
        self._table, self._stream = table, stream
        self._identity = {"seed": seed, "corpus": fingerprint}

    def next_step(self) -> list[Batch]:
        rows, self.progress = self._stream.take(self.progress, self.rows_per_step)
        targets = self._stream.num_targets(rows)
        stride = self.world_size * self.micro_batch_rows
        batches = []
        for first in range(self.rank * self.micro_batch_rows, self.rows_per_step, stride):
            filled = [self._stream.pieces(number, row) for number, row in rows[first : first + self.micro_batch_rows]]
            batches.append(pack(self._table, filled, self.seq_len, step_targets=targets))
        return batches

    def epochs(self) -> dict[str, float]:
        return {pool.name: place.tokens / pool.tokens for pool, place in zip(self._stream.pools, self.progress, strict=True)}

    def labels(self, batches: Sequence[Batch]) -> list[int]:
        return sorted({origin.document for batch in batches for origin in batch.documents} - {PADDING})

    def state_dict(self) -> dict[str, Any]:
        """Integers and names: for each pool, epoch and offset say where its group of rows begins, `views` is a list of
        [seq_len, rows visited, packing] (`data.stream.Progress`).
        """
        return {"pools": self._stream.to_state(self.progress), **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which may come from another seq_len, packing, mix of the same pools, batch or world size.

        Raises ConfigError where it is of another seed, corpus or set of pools, since its place means nothing here.
        """
        if "ranks" in state:
            raise ConfigError("resume: the saved stream is one of sources that were not prepared; set data.streaming=true, or start anew")
        for key, value in self._identity.items():
            if state[key] != value:
                raise ConfigError(f"resume: the saved stream has {key}={state[key]}, this run has {key}={value}; they must be the same")
        pools = state["pools"] if "pools" in state else upgraded(state, self.epoch_tokens)
        self.progress = self._stream.from_state(pools)


class StreamedLoader(Loader):
    """Over a streamed corpus: every rank reads its own documents and packs its own rows. What ranks must know of each other, the targets
    of a step and whether one of them has failed, they tell in `gather`."""

    _table: DocumentList

    def __init__(self, stream: LiveRows, identity: dict[str, Any], gather: Gather, **shape: int) -> None:
        super().__init__(**shape)
        self.progress = stream.beginning()
        self._stream, self._identity, self._gather = stream, identity, gather

    def next_step(self) -> list[Batch]:
        """As of every loader. Raises ConfigError on all ranks where a source of one of them fails."""
        batches: list[Batch] = []
        failure: ConfigError | None = None
        try:
            rows, self.progress = self._stream.take(self.progress, self.rows_per_step // self.world_size)
            self._table, filled = self._stream.read(rows)
            for first in range(0, len(filled), self.micro_batch_rows):
                batches.append(pack(self._table, filled[first : first + self.micro_batch_rows], self.seq_len, step_targets=0))
        except ConfigError as error:
            failure = error
        told = self._gather((self.rank, sum(batch.num_targets for batch in batches), failure))
        for *_, problem in told:
            if problem is not None:
                raise failure or problem
        step_targets = sum(_of_shares((share, targets) for share, targets, _ in told))
        return [replace(batch, step_targets=step_targets) for batch in batches]

    def epochs(self) -> dict[str, float]:
        """Passes over each source, of this rank's share, up to where its group of rows in hand begins."""
        return self._stream.passes(self.progress)

    def labels(self, batches: Sequence[Batch]) -> list[str]:
        return sorted({self._table.label(origin.document) for batch in batches for origin in batch.documents if origin.document != PADDING})

    def state_dict(self) -> dict[str, Any]:
        """For each rank and source, where its group of rows begins and the `views` of it (`data.stream.Progress`); besides, all that the
        documents and their order depend on, the files of the sources among it."""
        states = _of_shares(self._gather((self.rank, self._stream.to_state(self.progress))))
        return {"ranks": states, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which may come from another seq_len, packing, batch or weights.

        Raises ConfigError where it is of another number of ranks or seed, or of sources, files or settings that give other documents.
        """
        if "ranks" not in state:
            raise ConfigError("resume: the saved stream is one of a prepared corpus; set data.streaming=false, or start anew")
        if len(state["ranks"]) != self.world_size:
            raise ConfigError(
                f"resume: the saved stream was read by {len(state['ranks'])} data-parallel ranks, this run has {self.world_size}; "
                "a streamed corpus goes on at the same number of ranks, a prepared one (scripts.prepare_data) at any"
            )
        self._stream.check_parts(state["parts"])
        for key in self._identity.keys() - {"parts"}:
            if found := first_difference(state[key], self._identity[key], key):
                where, old, new = found
                raise ConfigError(f"resume: the saved stream has {where}={old}, this run has {where}={new}; they must be the same")
        self.progress = self._stream.from_state(state["ranks"][self.rank])


def _of_shares(told: Iterable[tuple[int, Any]]) -> list[Any]:
    """The value of each share of the data, in order: ranks that share rows have one share, and told the same of it."""
    return [value for _, value in sorted(dict(told).items())]


def open_corpus(data: DataConfig, *, heldout_tokens: int) -> OpenCorpus:
    """The prepared corpus of `data`, or with data.streaming its sources, of whose held-out documents the first `heldout_tokens` are kept.

    Raises ConfigError for what is missing, damaged or not readable.
    """
    return StreamedCorpus(data, heldout_tokens=heldout_tokens) if data.streaming else Corpus.open(data.prepared_dir)


def build_loader(
    corpus: OpenCorpus | str | Path,
    *,
    seq_len: int,
    rows_per_step: int,
    micro_batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    mix: MixConfig | None = None,
    run_mixes: Sequence[MixConfig] = (),
    gather: Gather = lambda value: [value],
    state: dict[str, Any] | None = None,
) -> Loader:
    """The loader of `rank` over an open corpus (or the folder of a prepared one), from its beginning or from a `state_dict`.

    `rows_per_step` counts the rows of one optimizer step over all ranks and micro-batches. `mix` is the stage's (None: all documents),
    `run_mixes` those of all stages of the run, which must be the same for all of its loaders. `gather` is for streamed corpora, whose
    ranks have to talk. Raises ConfigError where the numbers do not divide, there are no documents or not what the mix asks for, documents
    fill no row, the corpus is missing or damaged, or `state` does not fit.
    """
    for key, value in (("seq_len", seq_len), ("rows_per_step", rows_per_step), ("micro_batch_rows", micro_batch_rows)):
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    if rows_per_step % (world_size * micro_batch_rows):
        raise ConfigError(
            f"rows_per_step={rows_per_step}: must be a multiple of world_size * micro_batch_rows = {world_size} * {micro_batch_rows}"
        )
    mix = mix or MixConfig()
    opened = Corpus.open(corpus) if isinstance(corpus, str | Path) else corpus
    shape = {"seq_len": seq_len, "rows_per_step": rows_per_step, "micro_batch_rows": micro_batch_rows}
    shape |= {"rank": rank, "world_size": world_size}
    loader: Loader
    if isinstance(opened, StreamedCorpus):
        rows = LiveRows(opened, mix, seed=seed, seq_len=seq_len, share=Share(rank, world_size))
        loader = StreamedLoader(rows, {"seed": seed, **rows.identity()}, gather, **shape)
    else:
        table = opened.split("train")
        require_documents(opened, table)
        stream = MixedStream(table, mix, run_mixes or (mix,), seed=seed, seq_len=seq_len)
        loader = PreparedLoader(table, stream, opened.fingerprint, seed=seed, **shape)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def heldout_rows(
    corpus: OpenCorpus, *, seq_len: int, rows: int, micro_batch_rows: int = 1, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """The first `rows` held-out rows in the order of one fixed seed, as this rank's batches; the same rows in every run.

    Fewer where held-out holds fewer full rows, so that no token is scored twice. Every rank gets the same number of batches, since its
    collectives must match: rows that fill up have no targets. `step_targets` counts the targets of all rows.
    Raises ConfigError where held-out documents do not fill one row.
    """
    table = corpus.split("heldout")
    require_documents(corpus, table)
    stream = TokenStream(table.lengths, seed=_HELDOUT_SEED)
    available = stream.epoch_tokens // seq_len
    if available == 0:
        raise ConfigError(
            f"seq_len={seq_len}: the held-out documents of {corpus.name} have {stream.epoch_tokens} tokens and fill no row; "
            "hold out more, or set evaluation.rows=0"
        )
    rows = min(rows, available)
    taken, _ = stream.take(Progress(stream.beginning), rows + 1, seq_len)  # one more: the row that runs on into the next epoch is left out
    chosen = [row for row in taken if _ends_in_first_epoch(row, stream)][:rows]
    targets = rows * seq_len - stream.num_document_ends(chosen)
    batches = []
    for first in range(0, rows, world_size * micro_batch_rows):
        numbers = range(first + rank * micro_batch_rows, first + (rank + 1) * micro_batch_rows)
        filled = [stream.pieces(chosen[n if n < rows else 0]) for n in numbers]
        batches.append(pack(table, filled, seq_len, step_targets=targets, masked_rows=sum(n >= rows for n in numbers)))
    return batches


def _ends_in_first_epoch(row: Row[Position], stream: TokenStream) -> bool:
    position, num_tokens = row[-1]
    return position.epoch == 0 and position.offset + num_tokens <= stream.epoch_tokens


def require_documents(corpus: OpenCorpus, table: Documents) -> None:
    """Raises ConfigError for a split without documents."""
    if table.num_documents == 0:
        raise ConfigError(f"{corpus.name}: its {table.name} split holds no documents")


__all__ = [
    "IGNORE",
    "PADDING",
    "Batch",
    "Loader",
    "OpenCorpus",
    "PieceOrigin",
    "build_loader",
    "heldout_rows",
    "open_corpus",
    "require_documents",
]
