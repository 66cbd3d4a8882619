"""Preparing a corpus, beside what the tokenizer library alone does with the same text on the same cores."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configs.schema import DataBenchmarkConfig, DataConfig, InvalidText, SourceConfig, SourceFormat, TokenizerConfig, TokenizerKind
from data.documents import LeftOut, read_documents
from data.prepare import prepare
from data.tokenizer import train_tokenizer
from data.workers import resolve_workers
from scripts.data_benchmark.report import Measured

_VOCAB = 8192
_SAMPLE = 4_000_000  # characters that the tokenizer is trained on, as in data=bundled


def preparing(config: DataBenchmarkConfig, folder: Path) -> list[Measured]:
    """MB/s of text, for a sentencepiece and a Hugging Face tokenizer: their library alone, all in memory; then all of preparation."""
    bundled = list(_bundled())
    texts = list(_copies(bundled, config.text_bytes))
    num_bytes = sum(len(text.encode()) for text in texts)
    source = folder / "texts.jsonl"
    with source.open("w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    cores = resolve_workers(config.num_workers)
    figures = []
    for kind, (file, library) in _tokenizers(bundled, folder, cores).items():
        alone = _measure(partial(library, texts))
        corpus = DataConfig(
            prepared_dir=str(folder / f"corpus-{kind.value}"),
            sources=(SourceConfig(name="texts", format=SourceFormat.JSONL, path=str(source)),),
            tokenizer=TokenizerConfig(kind=kind, path=str(file)),
            num_workers=cores,
        )
        whole = _measure(partial(prepare, corpus))
        what = f"{kind.value}, {num_bytes / 1e6:.0f} MB, {cores} cores"
        note = (
            f"{alone.seconds / whole.seconds:.0%} by the clock, {alone.cpu / whole.cpu:.0%} by CPU time (which other programs leave alone)"
        )
        figures += [
            Measured(name=f"library alone ({what})", value=num_bytes / alone.seconds / 1e6, unit="MB/s"),
            Measured(name=f"preparing ({what})", value=num_bytes / whole.seconds / 1e6, unit="MB/s", target="80 % of that", note=note),
        ]
    return figures


def _bundled() -> Iterator[str]:
    for kind in (SourceFormat.SOTU, SourceFormat.PYTHON_STDLIB):
        source = SourceConfig(name=kind.value, format=kind)
        yield from (document.text for document in read_documents(source, invalid_utf8=InvalidText.SKIP, left_out=LeftOut()))


def _copies(texts: list[str], num_bytes: int) -> Iterator[str]:
    """The texts over and over until there are `num_bytes`, in each round under another first line: none is a duplicate."""
    given = 0
    for number in itertools.count():
        for text in texts:
            if given >= num_bytes:
                return
            text = f"copy {number}\n{text}"
            given += len(text.encode())
            yield text


def _tokenizers(texts: list[str], folder: Path, cores: int) -> dict[TokenizerKind, tuple[Path, Callable[[list[str]], object]]]:
    """A tokenizer of each kind, trained on the same text: its file, and the fastest call its library has for many texts."""
    sample = list(_pieces(texts))
    plain = folder / "tokenizer.model"
    plain.write_bytes(train_tokenizer(sample, vocab_size=_VOCAB))
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    processor = SentencePieceProcessor(model_file=str(plain))
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer.show_progress = False
    byte_level.train_from_iterator(sample, trainer)
    byte_level.save(str(folder / "tokenizer.json"))

    def sentencepiece(texts: list[str]) -> None:
        with ThreadPoolExecutor(cores) as pool:  # the library lets go of the interpreter; its own threads wait for the slowest text
            for _ in pool.map(processor.encode, texts):
                pass

    def huggingface(texts: list[str]) -> None:
        for start in range(0, len(texts), 1000):
            byte_level.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)

    return {
        TokenizerKind.SENTENCEPIECE: (plain, sentencepiece),
        TokenizerKind.HUGGINGFACE: (folder / "tokenizer.json", huggingface),
    }


def _pieces(texts: list[str]) -> Iterator[str]:
    """An even share of every text, `_SAMPLE` characters in all."""
    share = _SAMPLE / sum(map(len, texts))
    yield from (text[: max(1, int(share * len(text)))] for text in texts)


class _Taken(NamedTuple):
    """Seconds by the clock, and of CPU in this process and those it started."""

    seconds: float
    cpu: float


def _measure(work: Callable[[], object]) -> _Taken:
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    work()
    return _Taken(time.perf_counter() - start, sum(os.times()[:4]) - cpu)
