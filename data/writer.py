"""Writing a corpus: token shards with their index, and the folder around them that is complete or absent.

Preparation appends to files in `TARGET.partial` and now and then commits: what they hold reaches the disk, then `.state.json` says how
long each is and where the sources had been read to. After a kill files are cut back to their committed length, whatever was written
since, and preparation goes on from there. `TARGET` is a rename of the finished folder.
"""

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configs.schema import ConfigError
from data.documents import Outage
from data.manifest import FILE_NAME, INDEX, SplitManifest, describe_file

STATE_NAME = ".state.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INDEX_BATCH = 1 << 16


class SplitWriter:
    """Shards and index of one split. A document lies whole in one shard; only a document longer than a shard makes one larger.

    `state` is what an earlier writer's `state()` was when its files were as long as they are now.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        state = state or {"documents": 0, "shards": [], "in_shard": 0, "finished": {}}
        self.documents: int = state["documents"]
        self.finished: dict[str, dict[str, Any]] = dict(state["finished"])
        """Size and checksum of each shard that will not change any more."""
        self._shards: list[str] = list(state["shards"])
        self._in_shard: int = state["in_shard"]
        self._file: BinaryIO | None = None
        if self._shards and self._shards[-1] not in self.finished:
            self._file = open(folder / self._shards[-1], "ab")  # noqa: SIM115 (kept open over many documents)
        self.index_name = f"{split}-index.npy"
        new = not (folder / self.index_name).exists()
        self._index = open(folder / self.index_name, "r+b" if not new else "w+b")  # noqa: SIM115
        self._index.seek(0, os.SEEK_END)
        if new:
            self._index.write(_index_header(0))

    def append(self, tokens: np.ndarray, *, source: int, num_bytes: int, digest: bytes) -> None:
        """Adds one document: `tokens` [length] with its separators, and the 16-byte digest of its text."""
        if not self._shards or self._shards[-1] in self.finished or self._in_shard + len(tokens) > self._shard_tokens:
            self._next_shard()
        assert self._file is not None
        record = np.zeros((), INDEX)
        record["offset"], record["length"], record["bytes"] = self._in_shard, len(tokens), num_bytes
        record["shard"], record["source"], record["hash"] = len(self._shards) - 1, source, np.frombuffer(digest, "u1")
        self._index.write(record.tobytes())
        self._file.write(tokens.astype(self._dtype, copy=False).data)
        self._in_shard += len(tokens)
        self.documents += 1

    def state(self) -> dict[str, Any]:
        """Brings what was appended to the disk, and says where the writer stands, as JSON values."""
        for file in (self._file, self._index):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        return {"documents": self.documents, "shards": self._shards, "in_shard": self._in_shard, "finished": self.finished}

    def digests(self) -> Iterator[bytes]:
        """The digests of the documents so far."""
        self._index.flush()
        for records in _index_batches(self._folder / self.index_name):
            yield from (digest.tobytes() for digest in records["hash"])

    def finish(self, sources: list[str]) -> SplitManifest:
        """Closes the shards, completes the index and returns the counts."""
        if self._file is not None:
            self._end_shard()
        self._index.seek(0)
        self._index.write(_index_header(self.documents))
        self._index.flush()
        totals = np.zeros((len(sources), 3), np.int64)
        longest = 0
        for records in _index_batches(self._folder / self.index_name):
            for column, values in enumerate((np.ones(len(records), np.int64), records["length"], records["bytes"])):
                np.add.at(totals[:, column], records["source"], values.astype(np.int64))
            longest = max(longest, int(records["length"].max()))
        by_source = {
            name: dict(zip(("documents", "tokens", "bytes"), row, strict=True)) for name, row in zip(sources, totals.tolist(), strict=True)
        }
        documents, tokens, num_bytes = totals.sum(0).tolist()
        return SplitManifest(documents=documents, tokens=tokens, bytes=num_bytes, longest=longest, shards=self._shards, by_source=by_source)

    def close(self) -> None:
        """Lets go of the files."""
        for file in (self._file, self._index):
            if file is not None:
                file.close()

    def _next_shard(self) -> None:
        if self._file is not None:
            self._end_shard()
        self._shards.append(f"{self._split}-{len(self._shards):05d}.bin")
        self._file = open(self._folder / self._shards[-1], "wb")  # noqa: SIM115 (kept open over many documents)
        self._in_shard = 0

    def _end_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.finished[self._shards[-1]] = describe_file(self._folder / self._shards[-1])


def _index_header(documents: int) -> bytes:
    """The head of a .npy file of that many INDEX records; numpy pads it, so that it is as long for any number."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": INDEX.descr, "fortran_order": False, "shape": (documents,)})
    return head.getvalue()


def _index_batches(path: Path) -> Iterator[np.ndarray]:
    """The INDEX records of an index file as it is being written, some at a time."""
    with open(path, "rb") as file:
        file.seek(len(_index_header(0)))
        while content := file.read(_INDEX_BATCH * INDEX.itemsize):
            yield np.frombuffer(content, INDEX)


def commit(folder: Path, state: dict[str, Any]) -> None:
    """Makes `state` what a preparation that finds `folder` goes on from; each file in it counts at the length it has now.

    What the files hold must have reached the disk.
    """
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != STATE_NAME}
    beside = folder / f"{STATE_NAME}.new"
    sizes.pop(beside.name, None)
    with open(beside, "w") as file:
        json.dump(state | {"sizes": sizes}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / STATE_NAME)
    _sync(folder)


def _committed(folder: Path, identity: object) -> dict[str, Any] | None:
    """The last commit in `folder`, whose files are cut back to what they were then. None where it is of another identity, or there is none:
    then the folder is emptied."""
    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
        sizes: dict[str, int] = state["sizes"]
        whole = state["identity"] == identity and all((folder / name).stat().st_size >= size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    for path in folder.iterdir():
        if not whole or path.name not in sizes.keys() | {STATE_NAME}:
            path.unlink()
    if not whole:
        return None
    for name, size in sizes.items():
        os.truncate(folder / name, size)
    return state


@contextmanager
def building(target: Path, identity: object) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """A folder `TARGET.partial` to build in, with the state that an earlier preparation of the same `identity` committed there, or None.

    It becomes `target` when the block ends well, and an old `target` is replaced. When the block ends in a mistake of the user's the folder
    vanishes; after an Outage, a full disk or an interruption it stays, if there is a commit in it to go on from. Raises Outage when the
    disk is full or the place cannot be written, and ConfigError when another process is building the same corpus.
    """
    partial = target.with_name(target.name + ".partial")
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, error, kept=False) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when a process dies
        except OSError:
            raise ConfigError(f"data.prepared_dir={target}: another process is preparing it") from None
        try:
            state = _committed(partial, identity)
            yield partial, state
            _publish(partial, target)
        except BaseException as error:
            mistaken = isinstance(error, ConfigError) and not isinstance(error, Outage)
            kept = not mistaken and (partial / STATE_NAME).exists()
            if not kept:
                _remove(partial, made)
            if isinstance(error, OSError):
                raise _unwritable(target, error, kept) from None
            raise
    finally:
        os.close(lock)


def _remove(partial: Path, made: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):  # a parent that is no longer empty stays
        for parent in made:
            parent.rmdir()


def _unwritable(target: Path, error: OSError, kept: bool) -> Outage:
    reason = "the disk is full" if error.errno in _FULL else "cannot be written"
    left = "what was finished is kept, and the same command goes on from there" if kept else "nothing was kept"
    return Outage(f"data.prepared_dir={target}: {reason} ({error.strerror or error}); {left}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    for path in [*partial.iterdir(), partial]:
        _sync(path)  # content reaches the disk before the name that promises it
    if target.exists() and not (target / FILE_NAME).exists():
        target.rmdir()  # fails unless empty: what is not a corpus is not ours to remove
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    tidy(target)
    shutil.rmtree(old, ignore_errors=True)


def tidy(target: Path) -> None:
    """Takes away what preparation worked with, from a finished corpus."""
    for path in target.glob(".*"):
        path.unlink()
