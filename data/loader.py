"""The door to training data: the steps of one rank, and the held-out rows.

An optimizer step is the next rows_per_step rows of the stream, the same whatever the number of ranks. Micro-batch m of the step
holds rows [m * micro_batch_rows, (m + 1) * micro_batch_rows), and belongs to rank m % world_size.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ConfigError, MixConfig
from data.batch import IGNORE, PADDING, Batch, PieceOrigin, pack
from data.mix import LONG, MixedStream, PoolProgress, upgraded
from data.shards import Corpus, DocumentTable
from data.stream import Progress, Row, TokenStream

_HELDOUT_SEED = 0  # held-out rows are the same in every run


class Loader:
    """This rank's micro-batches, step by step, without end. Made by `build_loader`.

    `epoch_tokens` is the number of tokens of the split, `progress` what the steps before the next one have visited, by pool (`data.mix`).
    """

    def __init__(
        self,
        table: DocumentTable,
        stream: MixedStream,
        fingerprint: int,
        *,
        seq_len: int,
        rows_per_step: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.seq_len, self.rows_per_step, self.micro_batch_rows = seq_len, rows_per_step, micro_batch_rows
        self.rank, self.world_size = rank, world_size
        self.epoch_tokens = table.num_tokens
        self.progress = [PoolProgress()] * len(stream.pools)
        self._table, self._stream, self._fingerprint = table, stream, fingerprint

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step: rows_per_step / (world_size * micro_batch_rows) of them."""
        rows, self.progress = self._stream.take(self.progress, self.rows_per_step)
        targets = self._stream.num_targets(rows)
        stride = self.world_size * self.micro_batch_rows
        batches = []
        for first in range(self.rank * self.micro_batch_rows, self.rows_per_step, stride):
            filled = [self._stream.pieces(number, row) for number, row in rows[first : first + self.micro_batch_rows]]
            batches.append(pack(self._table, filled, self.seq_len, step_targets=targets))
        return batches

    def count(self, batches: Sequence[Batch]) -> dict[str, int]:
        """What rows hold: tokens of each source (`source/NAME`), tokens of documents from each length on (`length/0`, `length/8192`
        and so on up to the next), and `padding`. The keys are the same for all batches, so that counts of ranks can be summed.
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

    def epochs(self) -> dict[str, float]:
        """How often the documents of each pool have been seen by now, by the pool's name."""
        return {pool.name: place.tokens / pool.tokens for pool, place in zip(self._stream.pools, self.progress, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What is visited, and of which stream: integers and names, fit for JSON and the same on every rank.

        For each pool, epoch and offset say where its group of rows begins, `views` is a list of [seq_len, rows visited, packing]
        (`data.stream.Progress`).
        """
        return {"pools": self._stream.to_state(self.progress), "seed": self._stream.seed, "corpus": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which may come from another seq_len, packing, mix of the same pools, batch or world size.

        Raises ConfigError where it is of another seed, corpus or set of pools, since its place means nothing here.
        """
        here = {"seed": self._stream.seed, "corpus": self._fingerprint}
        for key, value in here.items():
            if state[key] != value:
                raise ConfigError(f"resume: the saved stream has {key}={state[key]}, this run has {key}={value}; they must be the same")
        pools = state["pools"] if "pools" in state else upgraded(state, self.epoch_tokens)
        self.progress = self._stream.from_state(pools)


def build_loader(
    corpus: Corpus | str | Path,
    *,
    seq_len: int,
    rows_per_step: int,
    micro_batch_rows: int,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    mix: MixConfig | None = None,
    run_mixes: Sequence[MixConfig] = (),
    state: dict[str, Any] | None = None,
) -> Loader:
    """The loader of `rank` over a prepared corpus (or its folder), from its beginning or from a `state_dict`.

    `rows_per_step` counts the rows of one optimizer step over all ranks and micro-batches. `mix` is the stage's (None: all documents),
    `run_mixes` those of all stages of the run, which must be the same for all of its loaders. Raises ConfigError where the numbers do
    not divide, the split is empty or does not have what the mix asks for, documents fill no row, the corpus is missing or damaged, or
    `state` is of another corpus, seed or set of pools.
    """
    opened = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    for key, value in (("seq_len", seq_len), ("rows_per_step", rows_per_step), ("micro_batch_rows", micro_batch_rows)):
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    if rows_per_step % (world_size * micro_batch_rows):
        raise ConfigError(
            f"rows_per_step={rows_per_step}: must be a multiple of world_size * micro_batch_rows = {world_size} * {micro_batch_rows}"
        )
    table = opened.split(split)
    require_documents(opened, table)
    mix = mix or MixConfig()
    loader = Loader(
        table,
        MixedStream(table, mix, run_mixes or (mix,), seed=seed, seq_len=seq_len),
        opened.fingerprint,
        seq_len=seq_len,
        rows_per_step=rows_per_step,
        micro_batch_rows=micro_batch_rows,
        rank=rank,
        world_size=world_size,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def heldout_rows(corpus: Corpus, *, seq_len: int, rows: int, micro_batch_rows: int = 1, rank: int = 0, world_size: int = 1) -> list[Batch]:
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
            f"seq_len={seq_len}: the held-out documents of {corpus.folder} have {stream.epoch_tokens} tokens and fill no row; "
            "hold out more, or set evaluation.rows=0"
        )
    rows = min(rows, available)
    taken, _ = stream.take(Progress(), rows + 1, seq_len)  # one more: the row that runs on into the next epoch is left out
    chosen = [row for row in taken if _ends_in_first_epoch(row, stream)][:rows]
    targets = rows * seq_len - stream.num_document_ends(chosen)
    batches = []
    for first in range(0, rows, world_size * micro_batch_rows):
        numbers = range(first + rank * micro_batch_rows, first + (rank + 1) * micro_batch_rows)
        filled = [stream.pieces(chosen[n if n < rows else 0]) for n in numbers]
        batches.append(pack(table, filled, seq_len, step_targets=targets, masked_rows=sum(n >= rows for n in numbers)))
    return batches


def _ends_in_first_epoch(row: Row, stream: TokenStream) -> bool:
    position, num_tokens = row[-1]
    return position.epoch == 0 and position.offset + num_tokens <= stream.epoch_tokens


def require_documents(corpus: Corpus, table: DocumentTable) -> None:
    """Raises ConfigError for a split without documents."""
    if table.num_documents == 0:
        raise ConfigError(f"data.prepared_dir={corpus.folder}: its {table.name} split holds no documents")


__all__ = ["IGNORE", "PADDING", "Batch", "Loader", "PieceOrigin", "build_loader", "heldout_rows", "require_documents"]
