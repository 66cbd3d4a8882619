"""Preparation: documents -> held-out choice -> tokenizer -> tokens -> a finished corpus in `prepared_dir`.

What goes where depends on the text of each document alone, so more documents, other files or another order never move a
document between training and held-out. Sources are read twice when a tokenizer is trained: once to sample, once to tokenise.
A preparation that was killed goes on from its last commit (`data.writer`) and ends in the same bytes.
"""

import hashlib
import heapq
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.mapping import first_difference, from_mapping
from configs.schema import ConfigError, DataConfig, TokenizerKind
from data.documents import LeftOut, describe_left_out, read_documents
from data.duplicates import DigestSet
from data.manifest import FILE_NAME, FORMAT_VERSION, SPLITS, Manifest, config_content, describe_file, is_occupied
from data.shards import Corpus
from data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, train_tokenizer
from data.workers import resolve_workers, tokenise
from data.writer import SplitWriter, building, commit, tidy

Progress = Callable[[str, int, int], None]
"""Called as (phase, bytes of text done, bytes of text in all, estimated from how far the files are read, or 0 where that is not known)."""

_COMMIT_BYTES = 64 << 20  # of text, after which what is done is committed if no shard has ended before: seconds to a minute of work
_PLACE_BYTES = 1 << 20  # of text between two documents after which a commit may be made
_SHORT_NAME = ".short.bin"  # digests of the documents that were too short, which no index holds
_REASONS = ("invalid_utf8", "empty", "duplicate", "too_short")
_PIECE_CHARACTERS = 2048  # of tokenizer training text: short enough to be an even sample, long enough to be few


@dataclass(frozen=True)
class _Origin:
    """What the index says of a document; `digest` is that of its text. Its tokens join it when a worker has made them.

    `name` is for messages. `share` of the sources has been read by now, 0 where that is not known; after some documents, `place` is
    where and with what left out.
    """

    name: str
    source: int
    num_bytes: int
    digest: bytes
    split: str
    share: float
    place: dict[str, Any] | None


def prepare(config: DataConfig, *, overwrite: bool = False, progress: Progress = lambda phase, done, total: None) -> Manifest:
    """Builds the corpus of `config` in `config.prepared_dir`, or finds it there.

    Output bytes depend on the sources and the config alone, not on the number of workers nor on kills. The folder is complete or absent;
    what a kill left of it is gone on from, unless the config or the names, sizes or times of the sources' files have changed.
    Raises ConfigError for bad sources, an empty corpus or split, a full disk, and a folder made from another config.
    """
    found = None if overwrite else find_prepared(config)
    if found is not None:
        tidy(Path(config.prepared_dir))
        return found
    target = Path(config.prepared_dir)
    if is_occupied(target) and not (target / FILE_NAME).exists():
        raise ConfigError(f"data.prepared_dir={target}: exists and is no corpus; it is left as it is, name another folder")
    if not config.sources:
        raise ConfigError("data.sources=[]: must name at least one source")
    sources = [read_documents(source, invalid_utf8=config.invalid_utf8, left_out=LeftOut()).fingerprint() for source in config.sources]
    identity = {"format": FORMAT_VERSION, "config": config_content(config), "sources": sources}
    with building(target, identity) as (folder, state):
        return _build(config, folder, state or {"identity": identity, "place": None}, progress)


def find_prepared(config: DataConfig) -> Manifest | None:
    """The manifest of the finished corpus in `config.prepared_dir`, None where there is none.

    Raises ConfigError where it is damaged or was made from another config: here the whole config is asked for, as nowhere else.
    """
    target = Path(config.prepared_dir)
    if not os.path.exists(target / FILE_NAME):
        return None
    manifest = Corpus.open(target).manifest
    made_from = config_content(from_mapping(DataConfig, manifest.config, "data."))  # with the defaults of settings added since
    if difference := first_difference(made_from, config_content(config), "data"):
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
    return _digest_and_size(text)[0]


def _digest_and_size(text: str) -> tuple[bytes, int]:
    content = text.encode()
    return hashlib.blake2b(content, digest_size=16).digest(), len(content)


def _build(config: DataConfig, folder: Path, state: dict[str, Any], progress: Progress) -> Manifest:
    """Goes on from `state`, which has a tokenizer and more where an earlier preparation came that far."""
    if "sampled" not in state:
        tokenizer, sampled = _place_tokenizer(config, folder, progress)
        state |= {"sampled": sampled, "done": 0, "splits": dict.fromkeys(SPLITS), "short": LeftOut().state()}
        if sampled:  # learning it took a pass over the sources
            commit(folder, state)
    tokenizer = load_tokenizer(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    left_out, short = LeftOut(), LeftOut()
    short.load(state["short"])
    done = committed = state["done"]
    shards = 0

    with ExitStack() as open_files:
        writers = {split: SplitWriter(folder, split, dtype, config.shard_tokens, state["splits"][split]) for split in SPLITS}
        for writer in writers.values():
            open_files.callback(writer.close)
        short_digests = open_files.enter_context(open(folder / _SHORT_NAME, "ab"))
        seen = open_files.enter_context(closing(DigestSet(folder)))
        for writer in writers.values():
            seen.update(writer.digests())
        seen.update(_digests(folder / _SHORT_NAME))

        def keep(place: dict[str, Any]) -> None:
            short_digests.flush()
            os.fsync(short_digests.fileno())
            splits = {split: writer.state() for split, writer in writers.items()}
            commit(folder, state | {"place": place, "done": done, "splits": splits, "short": short.state()})

        texts = _texts(config, left_out, seen, state["place"])
        # Closed before the folder goes away, should this end early: workers read the tokenizer there.
        workers = resolve_workers(config.num_workers)
        ends = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        tokenised = open_files.enter_context(closing(tokenise(texts, folder / tokenizer.file_name, dtype, workers, **ends)))
        for origin, tokens in tokenised:
            done += origin.num_bytes
            progress("tokenise", done, state["sampled"] or int(done / origin.share if origin.share else 0))
            if len(tokens) - 2 < config.min_document_tokens:
                short.add("too_short", origin.name)
                short_digests.write(origin.digest)
            else:
                writers[origin.split].append(tokens, source=origin.source, num_bytes=origin.num_bytes, digest=origin.digest)
            ended = sum(len(writer.finished) for writer in writers.values())
            if origin.place is not None and (ended > shards or done - committed >= _COMMIT_BYTES):
                keep(origin.place)
                committed, shards = done, ended
        counts = left_out.counts + short.counts
        names = left_out.names | short.names
        _require_both(config, {split: writers[split].documents for split in SPLITS}, counts, names)
        sources = [source.name for source in config.sources]
        splits = {split: writers[split].finish(sources) for split in SPLITS}
        keep({"source": len(sources), "reader": None, "left_out": left_out.state()})
    known = writers["train"].finished | writers["heldout"].finished
    made = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    manifest = Manifest(
        tokenizer_file=tokenizer.file_name,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=dtype.str,
        sources=sources,
        splits=splits,
        dropped={reason: counts[reason] for reason in _REASONS},
        dropped_names={reason: names[reason] for reason in _REASONS if reason in names},
        files={path.name: known.get(path.name) or describe_file(path) for path in made},
        config=config_content(config),
    )
    manifest.save(folder)
    return manifest


def _digests(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(16), b"")


def _place_tokenizer(config: DataConfig, folder: Path, progress: Progress) -> tuple[Tokenizer, int]:
    """Puts the tokenizer into `folder`; returns it with the bytes of text that were read for it (0 where none were)."""
    given = config.tokenizer
    if given.kind is TokenizerKind.TRAIN:
        sample, total_bytes = _sample(config, folder, progress)
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


def _texts(config: DataConfig, left_out: LeftOut, seen: DigestSet, place: dict[str, Any] | None = None) -> Iterator[tuple[_Origin, str]]:
    """The documents that count, each once, in the order of the sources; the others are added to `left_out`.

    From the beginning, or from the `place` of an earlier document, when `seen` holds the digests of all that counted before.
    """
    first = place["source"] if place else 0
    if place:
        left_out.load(place["left_out"])
    sizes = _sizes(config)
    unplaced = 0
    for number, source in enumerate(config.sources[first:], first):
        begin = place["reader"] if place and number == first else None
        reader = read_documents(source, invalid_utf8=config.invalid_utf8, left_out=left_out, place=begin)
        for document in reader:
            digest, num_bytes = _digest_and_size(document.text)
            if not num_bytes or document.text.isspace():
                left_out.add("empty", document.name)
            elif not seen.add(digest):
                left_out.add("duplicate", document.name)
            else:
                unplaced += num_bytes
                here = None
                if unplaced >= _PLACE_BYTES:
                    here = {"source": number, "reader": reader.place(), "left_out": left_out.state()}
                    unplaced = 0
                split = "heldout" if is_heldout(digest, config.heldout_fraction) else "train"
                share = (sizes[number] + reader.progress()[0]) / sizes[-1] if sizes else 0.0
                yield _Origin(document.name, number, num_bytes, digest, split, share, here), document.text


def _sizes(config: DataConfig) -> list[float]:
    """How much there is to read before each source, and in all; empty where that is not known, or is not of one unit."""
    if len(config.sources) > 1 and any(source.max_documents for source in config.sources):
        return []
    sizes = [read_documents(source, invalid_utf8=config.invalid_utf8, left_out=LeftOut()).progress()[1] for source in config.sources]
    return list(itertools.accumulate(sizes, initial=0.0)) if all(sizes) else []


def _sample(config: DataConfig, folder: Path, progress: Progress) -> tuple[list[str], int]:
    """An even sample of the training documents of about `train_bytes`, and the bytes of all documents.

    The pieces with the smallest hash of (document, place in it) are kept: one pass, memory for the sample alone, and the same
    pieces in the same order however the documents come.
    """
    heap: list[tuple[int, str, int]] = []
    kept = total = 0
    counts = dict.fromkeys(SPLITS, 0)
    left_out = LeftOut()
    with closing(DigestSet(folder)) as seen:
        for origin, text in _texts(config, left_out, seen):
            counts[origin.split] += 1
            total += origin.num_bytes
            progress("sample", total, int(total / origin.share if origin.share else 0))
            for number, piece in enumerate(_pieces(text) if origin.split == "train" else ()):
                key = hashlib.blake2b(origin.digest + number.to_bytes(8, "big"), digest_size=8).digest()
                size = len(piece.encode())
                heapq.heappush(heap, (-int.from_bytes(key, "big"), piece, size))
                kept += size
                while len(heap) > 1 and kept - heap[0][2] >= config.tokenizer.train_bytes:
                    kept -= heapq.heappop(heap)[2]
    _require_both(config, counts, left_out.counts, left_out.names)
    progress("train tokenizer", total, 0)
    return [piece for _, piece, _ in sorted(heap, reverse=True)], total


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end at the first line end after 2048 characters, or at 4096."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS) + 1 or start + 2 * _PIECE_CHARACTERS
        yield text[start:end]
        start = end


def _require_both(config: DataConfig, documents: dict[str, int], counts: dict[str, int], names: dict[str, list[str]]) -> None:
    """Both splits must hold documents; held-out may be empty where heldout_fraction=0 asks for that."""
    total = sum(documents.values())
    if total == 0:
        left_out = (
            ", ".join(describe_left_out(reason, counts[reason], names[reason]) for reason in _REASONS if counts.get(reason)) or "none"
        )
        raise ConfigError(f"data.sources={[source.name for source in config.sources]}: no documents (left out: {left_out})")
    if documents["train"] == 0:
        raise ConfigError(f"data.heldout_fraction={config.heldout_fraction}: all {total} documents are held out, none is left for training")
    if documents["heldout"] == 0 and config.heldout_fraction > 0:
        raise ConfigError(
            f"data.heldout_fraction={config.heldout_fraction}: none of {total} documents is held out; raise it, or 0 for none on purpose"
        )
