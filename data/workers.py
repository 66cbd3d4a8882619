"""Parallel tokenisation: texts in, arrays of ids out, in the order they came.

Workers are spawned, not forked: the parent may hold the threads of Arrow or torch. What they are handed are the stretches of texts
(`data.tokenizer.stretches`), many short ones at a time, so that a very long text keeps all of them busy too.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np

from data.documents import Outage
from data.tokenizer import Tokenizer, load_tokenizer, stretches

Record = TypeVar("Record")

_CHUNK_CHARACTERS = 1 << 19  # handed to a worker at a time: some tenths of a second
_CHUNK_TEXTS = 4096  # and no more texts than this, were they empty

_tokenizer: Tokenizer | None = None


class _Stretch(NamedTuple):
    text: str
    begins: bool
    ends: bool


def resolve_workers(num_workers: int) -> int:
    """Processes to use; 0 means every core this process may run on."""
    if num_workers:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenise(
    texts: Iterable[tuple[Record, str]], tokenizer: Path, dtype: np.dtype, num_workers: int, *, bos_id: int, eos_id: int
) -> Generator[tuple[Record, np.ndarray], None, None]:
    """Each record with the ids of its text (`dtype`, between the two separators), in the order of `texts`.

    Beside the tokens of one text, at most three chunks of half a million characters per worker are in memory, and one text.
    Raises Outage when a worker dies.
    """
    records: deque[Record] = deque()
    bos, eos = np.array([bos_id], dtype), np.array([eos_id], dtype)
    parts = [bos]
    encoded = _encoded(_stretches(texts, records), tokenizer, dtype, num_workers)
    try:
        for ids, ends in encoded:
            parts.append(ids)
            if ends:
                whole = np.concatenate([*parts, eos])
                parts = [bos]
                yield records.popleft(), whole
    finally:
        encoded.close()


def _stretches(texts: Iterable[tuple[Record, str]], records: deque[Record]) -> Iterator[_Stretch]:
    """The stretches of all texts, each text's record put aside as its first one leaves."""
    for record, text in texts:
        records.append(record)
        begins, before = True, None
        for part in stretches(text):
            if before is not None:
                yield _Stretch(before, begins, False)
                begins = False
            before = part
        assert before is not None
        yield _Stretch(before, begins, True)


def _chunks(parts: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    chunk: list[_Stretch] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_TEXTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    parts: Iterable[_Stretch], tokenizer: Path, dtype: np.dtype, num_workers: int
) -> Generator[tuple[np.ndarray, bool], None, None]:
    """The ids of each stretch, and whether a text ends with it."""
    if num_workers == 1:
        loaded = load_tokenizer(tokenizer)
        for part in parts:
            yield np.array(loaded.encode_stretch(part.text, begins=part.begins), dtype), part.ends
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_load, initargs=(tokenizer,)) as pool:
        waiting: deque[tuple[list[bool], Future[list[np.ndarray]]]] = deque()
        try:
            for chunk in _chunks(parts):
                with interrupts_held(), bare_main():
                    waiting.append(([part.ends for part in chunk], pool.submit(_encode, chunk, dtype)))
                if len(waiting) > 3 * num_workers:
                    yield from _result(waiting)
            while waiting:
                yield from _result(waiting)
        except BrokenProcessPool:
            raise Outage(f"data.num_workers={num_workers}: a tokenising process died, perhaps out of memory; try fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends. Processes that start in it hold it for ever: it is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def bare_main() -> Iterator[None]:
    """A process that is spawned imports the program that runs, with all that it imports, torch perhaps: seconds for nothing here."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _result(waiting: deque[tuple[list[bool], Future[list[np.ndarray]]]]) -> Iterator[tuple[np.ndarray, bool]]:
    ends, future = waiting.popleft()
    yield from zip(future.result(), ends, strict=True)


def _load(path: Path) -> None:
    global _tokenizer
    # A signal to the parent's group would end this process in the middle of a result, for whose rest the parent then waits for ever.
    os.setpgid(0, 0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(path)


def end_with_parent() -> None:
    """A worker holds its own queue open and would wait for ever on a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: list[_Stretch], dtype: np.dtype) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [np.array(_tokenizer.encode_stretch(part.text, begins=part.begins), dtype) for part in chunk]
