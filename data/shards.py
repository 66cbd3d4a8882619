"""A prepared corpus, checked when it is opened and memory-mapped when it is read: shards and index alike."""

from functools import cached_property
from pathlib import Path

import numpy as np

from configs.schema import ConfigError
from data.manifest import INDEX, SPLITS, Manifest, SplitManifest, damaged, describe_file, unreadable
from data.tokenizer import Tokenizer, content_hash, load_tokenizer

_VERIFY_BYTES = 1 << 28  # up to here files are verified whole at each start: under half a second
_INDEX_BATCH = 1 << 18


class DocumentTable:
    """The documents of one split, numbered 0..num_documents-1. Raises ConfigError for an index that does not read."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.name = split
        self.counts: SplitManifest = manifest.splits[split]
        self.sources = manifest.sources
        self._folder, self._dtype = folder, np.dtype(manifest.dtype)
        self._shards: dict[int, np.ndarray] = {}
        self._path = folder / f"{split}-index.npy"
        try:
            self._index = np.load(self._path, mmap_mode="r") if self.counts.documents else np.zeros(0, INDEX)
        except (OSError, ValueError) as error:
            raise damaged(self._path, f"cannot be read ({error})") from None
        if self._index.dtype != INDEX or len(self._index) != self.counts.documents:
            raise damaged(self._path, f"holds {len(self._index)} records of another kind or number, not {self.counts.documents}")

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
        return self._column("length", np.int64)

    @cached_property
    def source_numbers(self) -> np.ndarray:
        """The position in `sources` of each document's source: [num_documents] uint32."""
        return self._column("source", np.uint32)

    def _column(self, name: str, dtype: type) -> np.ndarray:
        """A column of the index as an array of its own, read past the map: touched pages of a map count as memory of the process."""
        column: np.ndarray = np.zeros(self.num_documents, dtype)
        if self.num_documents:
            with open(self._path, "rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                for first in range(0, self.num_documents, _INDEX_BATCH):
                    records = np.fromfile(file, INDEX, min(_INDEX_BATCH, self.num_documents - first))
                    column[first : first + len(records)] = records[name]
        return column

    def shard(self, number: int) -> np.ndarray:
        """The tokens of a shard, document after document in the order of the index: read-only, uint16 or uint32."""
        if number not in self._shards:
            self._shards[number] = np.memmap(self._folder / self.counts.shards[number], self._dtype, mode="r")
        return self._shards[number]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: a read-only view into the shard, uint16 or uint32. Token 0 is its bos, the last its eos."""
        record = self._index[document]
        number, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        if number >= len(self.counts.shards) or offset + length > len(self.shard(number)):
            raise damaged(self._path, f"document {document} lies outside its shard")
        stop = length if stop is None else min(stop, length)
        return self.shard(number)[offset + start : offset + stop]

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

        Format, the size of every file and the tokenizer are always checked, and the checksums of the indexes where they are small (256 MB,
        about 5M documents); those of the shards where the whole corpus is (256 MB) and `verify` is None. `verify=True` checks all.
        Raises ConfigError, naming the file, for what is missing, unreadable, cut short or altered.
        """
        folder = Path(prepared_dir)
        manifest = Manifest.load(folder)
        corpus = cls(folder, manifest)
        shards = {shard for split in manifest.splits.values() for shard in split.shards}
        indexes = {f"{split}-index.npy" for split in SPLITS}
        checked = set(manifest.files)
        for names, skipped in ((shards, verify is False), (indexes, False)):
            if verify is not True and (skipped or _size(manifest, checked) > _VERIFY_BYTES):
                checked -= names
        verify_corpus(folder, manifest, checksums=checked)
        return corpus

    def split(self, name: str) -> DocumentTable:
        """The documents of `train` or `heldout`."""
        if name not in SPLITS:
            raise ConfigError(f"split={name}: accepted: {', '.join(SPLITS)}")
        if name not in self._splits:
            self._splits[name] = DocumentTable(self.folder, name, self.manifest)
        return self._splits[name]

    @property
    def name(self) -> str:
        """The corpus in messages."""
        return f"data.prepared_dir={self.folder}"

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


def _size(manifest: Manifest, names: set[str]) -> int:
    return sum(manifest.files[name]["size"] for name in names)


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
    powers = np.frexp(np.maximum(lengths, 1))[1] - 1  # of two, exact below 2^53
    documents = np.bincount(powers)
    tokens = np.zeros(len(documents), np.int64)
    np.add.at(tokens, powers, lengths)
    return [(1 << power, int(documents[power]), int(tokens[power])) for power in np.flatnonzero(documents).tolist()]
