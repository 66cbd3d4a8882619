"""Preparation: documents -> held-out choice -> tokenizer -> tokens -> a finished corpus in `prepared_dir`.

What goes where depends on the text of each document alone, so more documents, other files or another order never move a
document between training and held-out. Sources are read twice when a tokenizer is trained: once to sample, once to tokenise.
"""

import hashlib
import heapq
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.mapping import first_difference
from configs.schema import ConfigError, DataConfig, TokenizerKind
from data.documents import LeftOut, read_documents
from data.manifest import FILE_NAME, SPLITS, Manifest, config_content, describe_file, is_occupied
from data.shards import Corpus
from data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, train_tokenizer
from data.workers import resolve_workers, tokenise
from data.writer import SplitWriter, building

Progress = Callable[[str, int, int], None]
"""Called as (phase, bytes of text done, bytes of text in all or 0 where that is not known)."""

_CHUNK_CHARACTERS = 1 << 19  # handed to a worker at a time: some tenths of a second
_PIECE_CHARACTERS = 2048  # of tokenizer training text: short enough to be an even sample, long enough to be few


@dataclass(frozen=True)
class _Origin:
    """What the index says of a document; `digest` is that of its text. Its tokens join it when a worker has made them.

    `name` is for messages.
    """

    name: str
    source: int
    num_bytes: int
    digest: bytes
    split: str


def prepare(config: DataConfig, *, overwrite: bool = False, progress: Progress = lambda phase, done, total: None) -> Manifest:
    """Builds the corpus of `config` in `config.prepared_dir`, or finds it there.

    Output bytes depend on the sources and the config alone, not on the number of workers. The folder is complete or absent.
    Raises ConfigError for bad sources, an empty corpus or split, a full disk, and a folder made from another config.
    """
    found = None if overwrite else find_prepared(config)
    if found is not None:
        return found
    target = Path(config.prepared_dir)
    if is_occupied(target) and not (target / FILE_NAME).exists():
        raise ConfigError(f"data.prepared_dir={target}: exists and is no corpus; it is left as it is, name another folder")
    if not config.sources:
        raise ConfigError("data.sources=[]: must name at least one source")
    with building(target) as folder:
        return _build(config, folder, progress)


def find_prepared(config: DataConfig) -> Manifest | None:
    """The manifest of the finished corpus in `config.prepared_dir`, None where there is none.

    Raises ConfigError where it is damaged or was made from another config: here the whole config is asked for, as nowhere else.
    """
    target = Path(config.prepared_dir)
    if not os.path.exists(target / FILE_NAME):
        return None
    manifest = Corpus.open(target).manifest
    if difference := first_difference(manifest.config, config_content(config), "data"):
        key, made, asked = difference
        raise ConfigError(
            f"{key}={asked}: {target} was prepared with {made}; overwrite=true replaces it, or name another data.prepared_dir"
        )
    return manifest


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Whether the document whose text has this blake2b digest is held out: a coin that the text alone tosses."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def text_digest(text: str) -> bytes:
    """blake2b of the text in UTF-8, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _build(config: DataConfig, folder: Path, progress: Progress) -> Manifest:
    tokenizer, total_bytes = _place_tokenizer(config, folder, progress)
    left_out = LeftOut()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers = {split: SplitWriter(folder, split, dtype, config.shard_tokens) for split in SPLITS}
    texts = _chunks(_texts(config, left_out))
    done = 0
    try:
        # Closed before the folder goes away, should this end early: workers read the tokenizer there.
        with closing(tokenise(texts, folder / tokenizer.file_name, dtype, resolve_workers(config.num_workers))) as tokenised:
            for origin, tokens in tokenised:
                done += origin.num_bytes
                progress("tokenise", done, total_bytes)
                if len(tokens) < config.min_document_tokens:
                    left_out.add("too_short", origin.name)
                    continue
                whole = np.concatenate((np.array([tokenizer.bos_id], dtype), tokens, np.array([tokenizer.eos_id], dtype)))
                writers[origin.split].append(whole, source=origin.source, num_bytes=origin.num_bytes, digest=origin.digest)
    finally:
        for writer in writers.values():
            writer.close()
    _require_both(config, {split: writers[split].documents for split in SPLITS}, left_out)
    sources = [source.name for source in config.sources]
    manifest = Manifest(
        tokenizer_file=tokenizer.file_name,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=dtype.str,
        sources=sources,
        splits={split: writers[split].finish(sources) for split in SPLITS},
        dropped={reason: left_out.counts[reason] for reason in ("invalid_utf8", "empty", "duplicate", "too_short")},
        dropped_names=dict(left_out.names),
        files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
        config=config_content(config),
    )
    manifest.save(folder)
    return manifest


def _place_tokenizer(config: DataConfig, folder: Path, progress: Progress) -> tuple[Tokenizer, int]:
    """Puts the tokenizer into `folder`; returns it with the bytes of text that were read for it (0 where none were)."""
    given = config.tokenizer
    if given.kind is TokenizerKind.TRAIN:
        sample, total_bytes = _sample(config, progress)
        (folder / "tokenizer.model").write_bytes(train_tokenizer(sample, vocab_size=given.vocab_size))
        return load_tokenizer(folder), total_bytes
    path = Path(given.path)
    if path.is_dir():
        path /= next(name for name, kind in FILE_NAMES.items() if kind is given.kind)
    try:
        tokenizer = load_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer.path={error}") from None
    if FILE_NAMES[tokenizer.file_name] is not given.kind:
        raise ConfigError(
            f"data.tokenizer.path={given.path}: a {FILE_NAMES[tokenizer.file_name].value} file, kind={given.kind.value} was asked for"
        )
    shutil.copyfile(path, folder / tokenizer.file_name)
    beside = path.with_name("tokenizer_config.json")
    if given.kind is TokenizerKind.HUGGINGFACE and beside.is_file():
        shutil.copyfile(beside, folder / beside.name)
    return tokenizer, 0


def _texts(config: DataConfig, left_out: LeftOut) -> Iterator[tuple[_Origin, str]]:
    """The documents that count, each once, in the order of the sources; the others are added to `left_out`."""
    seen: set[bytes] = set()
    for number, source in enumerate(config.sources):
        for document in read_documents(source, invalid_utf8=config.invalid_utf8, left_out=left_out):
            digest = text_digest(document.text)
            if not document.text.strip():
                left_out.add("empty", document.name)
            elif digest in seen:
                left_out.add("duplicate", document.name)
            else:
                seen.add(digest)
                split = "heldout" if is_heldout(digest, config.heldout_fraction) else "train"
                yield _Origin(document.name, number, len(document.text.encode()), digest, split), document.text


def _chunks(texts: Iterator[tuple[_Origin, str]]) -> Iterator[tuple[list[_Origin], list[str]]]:
    origins: list[_Origin] = []
    chunk: list[str] = []
    size = 0
    for origin, text in texts:
        origins.append(origin)
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield origins, chunk
            origins, chunk, size = [], [], 0
    if chunk:
        yield origins, chunk


def _sample(config: DataConfig, progress: Progress) -> tuple[list[str], int]:
    """An even sample of the training documents of about `train_bytes`, and the bytes of all documents.

    The pieces with the smallest hash of (document, place in it) are kept: one pass, memory for the sample alone, and the same
    pieces in the same order however the documents come.
    """
    heap: list[tuple[int, str, int]] = []
    kept = total = 0
    counts = dict.fromkeys(SPLITS, 0)
    left_out = LeftOut()
    for origin, text in _texts(config, left_out):
        counts[origin.split] += 1
        total += origin.num_bytes
        progress("sample", total, 0)
        for number, piece in enumerate(_pieces(text) if origin.split == "train" else ()):
            key = hashlib.blake2b(origin.digest + number.to_bytes(8, "big"), digest_size=8).digest()
            size = len(piece.encode())
            heapq.heappush(heap, (-int.from_bytes(key, "big"), piece, size))
            kept += size
            while len(heap) > 1 and kept - heap[0][2] >= config.tokenizer.train_bytes:
                kept -= heapq.heappop(heap)[2]
    _require_both(config, counts, left_out)
    progress("train tokenizer", total, 0)
    return [piece for _, piece, _ in sorted(heap, reverse=True)], total


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end at the first line end after 2048 characters, or at 4096."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS) + 1 or start + 2 * _PIECE_CHARACTERS
        yield text[start:end]
        start = end


def _require_both(config: DataConfig, documents: dict[str, int], left_out: LeftOut) -> None:
    """Both splits must hold documents; held-out may be empty where heldout_fraction=0 asks for that."""
    total = sum(documents.values())
    if total == 0:
        raise ConfigError(f"data.sources={[source.name for source in config.sources]}: no documents (left out: {left_out})")
    if documents["train"] == 0:
        raise ConfigError(f"data.heldout_fraction={config.heldout_fraction}: all {total} documents are held out, none is left for training")
    if documents["heldout"] == 0 and config.heldout_fraction > 0:
        raise ConfigError(
            f"data.heldout_fraction={config.heldout_fraction}: none of {total} documents is held out; raise it, or 0 for none on purpose"
        )
