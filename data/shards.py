"""A prepared corpus, checked when it is opened and memory-mapped when it is read."""

from functools import cached_property
from pathlib import Path

import numpy as np

from configs.schema import ConfigError
from data.manifest import INDEX, SPLITS, Manifest, SplitManifest, damaged, describe_file, unreadable
from data.tokenizer import Tokenizer, content_hash, load_tokenizer

_VERIFY_BYTES = 1 << 28  # a corpus up to here is verified whole at each start: under half a second


class DocumentTable:
    """The documents of one split, numbered 0..num_documents-1. Raises ConfigError for an index that does not read."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.name = split
        self.counts: SplitManifest = manifest.splits[split]
        self.sources = manifest.sources
        self._folder, self._dtype = folder, np.dtype(manifest.dtype)
        self._shards: dict[int, np.ndarray] = {}
        path = folder / f"{split}-index.npy"
        try:
            self._index = np.load(path, mmap_mode="r") if self.counts.documents else np.zeros(0, INDEX)
        except (OSError, ValueError) as error:
            raise damaged(path, f"cannot be read ({error})") from None

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return self.counts.documents

    @property
    def num_tokens(self) -> int:
        """Tokens in this split, separators included."""
        return self.counts.tokens

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, separators included: [num_documents] int64."""
        return self._index["length"].astype(np.int64)

    @cached_property
    def source_numbers(self) -> np.ndarray:
        """Source of each document, its place in `sources`: [num_documents] int64."""
        return self._index["source"].astype(np.int64)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: a read-only view into the shard, uint16 or uint32. Token 0 is its bos, the last its eos."""
        record = self._index[document]
        shard, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        stop = length if stop is None else min(stop, length)
        if shard not in self._shards:
            self._shards[shard] = np.memmap(self._folder / self.counts.shards[shard], self._dtype, mode="r")
        return self._shards[shard][offset + start : offset + stop]

    def byte_length(self, document: int) -> int:
        """Bytes of a document's text in UTF-8, for bits per byte."""
        return int(self._index[document]["bytes"])

    def text_hash(self, document: int) -> str:
        """blake2b of a document's text: 32 hex characters."""
        return self._index[document]["hash"].tobytes().hex()

    def source(self, document: int) -> str:
        """Name of the source a document came from."""
        return self.sources[int(self._index[document]["source"])]


class Corpus:
    """A prepared corpus. Open it with `Corpus.open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._splits: dict[str, DocumentTable] = {}

    @classmethod
    def open(cls, prepared_dir: str | Path, *, verify: bool | None = None) -> "Corpus":
        """The corpus in `prepared_dir`. What it holds, its manifest alone says; the rest of a DataConfig is for preparation.

        Format, the size of every file, the tokenizer and the indexes are always checked; the checksums of the shards with
        `verify=True`, never with False, and by default where the corpus is small (256 MB).
        Raises ConfigError, naming the file, for what is missing, unreadable, cut short or altered.
        """
        folder = Path(prepared_dir)
        manifest = Manifest.load(folder)
        corpus = cls(folder, manifest)
        total = sum(file["size"] for file in manifest.files.values())
        shards = {shard for split in manifest.splits.values() for shard in split.shards}
        whole = total <= _VERIFY_BYTES if verify is None else verify
        verify_corpus(folder, manifest, checksums=set(manifest.files) if whole else set(manifest.files) - shards)
        return corpus

    def split(self, name: str) -> DocumentTable:
        """The documents of `train` or `heldout`."""
        if name not in SPLITS:
            raise ConfigError(f"split={name}: accepted: {', '.join(SPLITS)}")
        if name not in self._splits:
            self._splits[name] = DocumentTable(self.folder, name, self.manifest)
        return self._splits[name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with."""
        return load_tokenizer(self.folder / self.manifest.tokenizer_file)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id that can occur."""
        return self.manifest.vocab_size

    @property
    def tokenizer_hash(self) -> str:
        """blake2b of the tokenizer's file (hex)."""
        return self.manifest.tokenizer_hash

    @cached_property
    def fingerprint(self) -> int:
        """A number of 63 bits that differs between corpora of different content: the saved state of a stream carries it."""
        contents = sorted((name, file["blake2b"]) for name, file in self.manifest.files.items())
        return int(content_hash(repr(contents).encode())[:16], 16) >> 1


def verify_corpus(folder: Path, manifest: Manifest, *, checksums: set[str] | None = None) -> None:
    """Checks the size of every file of the corpus and the checksum of those named (None: all). Raises ConfigError naming the file."""
    for name, wanted in manifest.files.items():
        path = folder / name
        other = "; it is not the tokenizer the shards were made with" if name == manifest.tokenizer_file else ""
        try:
            if not path.is_file():
                raise damaged(path, "is missing")
            if (size := path.stat().st_size) != wanted["size"]:
                raise damaged(path, f"has {size} bytes, preparation wrote {wanted['size']}{other}")
            if (checksums is None or name in checksums) and (digest := describe_file(path)["blake2b"]) != wanted["blake2b"]:
                raise damaged(path, f"has hash {digest}, preparation wrote {wanted['blake2b']}{other}")
        except OSError as error:
            raise unreadable(path, error) from None


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length in tokens, by powers of two: (from, documents, tokens) per non-empty bin [from, 2 from)."""
    bins = 1 << np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return [(int(low), int((bins == low).sum()), int(lengths[bins == low].sum())) for low in np.unique(bins)]
