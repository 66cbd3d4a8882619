"""Writing a corpus: token shards with their index, and the folder around them that is complete or absent."""

import errno
import fcntl
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs.schema import ConfigError
from data.manifest import FILE_NAME, INDEX, SplitManifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SplitWriter:
    """Shards and index of one split. A document lies whole in one shard; only a document longer than a shard makes one larger."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._shards: list[str] = []
        self._records = bytearray()

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._records) // INDEX.itemsize

    def append(self, tokens: np.ndarray, *, source: int, num_bytes: int, digest: bytes) -> None:
        """Adds one document: `tokens` [length] with its separators, and the 16-byte digest of its text."""
        if self._file is None or self._in_shard + len(tokens) > self._shard_tokens:
            self._next_shard()
        assert self._file is not None
        record = np.zeros((), INDEX)
        record["offset"], record["length"], record["bytes"] = self._in_shard, len(tokens), num_bytes
        record["shard"], record["source"], record["hash"] = len(self._shards) - 1, source, np.frombuffer(digest, "u1")
        self._records += record.tobytes()
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._in_shard += len(tokens)

    def finish(self, sources: list[str]) -> SplitManifest:
        """Closes the shards, writes the index and returns the counts."""
        self.close()
        index = np.frombuffer(self._records, INDEX)
        with open(self._folder / f"{self._split}-index.npy", "wb") as file:
            np.save(file, index)
        by_source: dict[str, dict[str, int]] = defaultdict(dict)
        for i, name in enumerate(sources):
            of_source = index[index["source"] == i]
            by_source[name] = {"documents": len(of_source)} | {
                key: int(of_source[column].sum()) for key, column in (("tokens", "length"), ("bytes", "bytes"))
            }
        return SplitManifest(
            documents=len(index),
            tokens=int(index["length"].sum()),
            bytes=int(index["bytes"].sum()),
            longest=int(index["length"].max(initial=0)),
            shards=self._shards,
            by_source=dict(by_source),
        )

    def close(self) -> None:
        """Ends the open shard."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_shard(self) -> None:
        self.close()
        self._shards.append(f"{self._split}-{len(self._shards):05d}.bin")
        self._file = open(self._folder / self._shards[-1], "wb")  # noqa: SIM115 (kept open over many documents)
        self._in_shard = 0


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder `TARGET.partial` to build in; it becomes `target` when the block ends well and vanishes when it does not.

    An old `target` is replaced. Raises ConfigError when the disk is full or the place cannot be written, and when another
    process is building the same corpus.
    """
    partial = target.with_name(target.name + ".partial")
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when a process dies
        except OSError:
            raise ConfigError(f"data.prepared_dir={target}: another process is preparing it") from None
        try:
            for left in partial.iterdir():  # of a preparation that was killed
                left.unlink()
            yield partial
            _flush(partial)
            _publish(partial, target)
        except BaseException as error:
            _remove(partial, made)
            if isinstance(error, OSError):
                raise _unwritable(target, error) from None
            raise
    finally:
        os.close(lock)


def _remove(partial: Path, made: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):  # a parent that is no longer empty stays
        for parent in made:
            parent.rmdir()


def _unwritable(target: Path, error: OSError) -> ConfigError:
    reason = "the disk is full" if error.errno in _FULL else "cannot be written"
    return ConfigError(f"data.prepared_dir={target}: {reason} ({error.strerror or error}); nothing was kept")


def _flush(folder: Path) -> None:
    """Content reaches the disk before the name that promises it."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    if target.exists() and not (target / FILE_NAME).exists():
        target.rmdir()  # fails unless empty: what is not a corpus is not ours to remove
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
