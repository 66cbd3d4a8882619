"""Parallel tokenisation: chunks of texts in, arrays of ids out, in the order they came.

Workers are spawned, not forked: the parent may hold the threads of Arrow or torch.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from configs.schema import ConfigError
from data.tokenizer import Tokenizer, load_tokenizer

Record = TypeVar("Record")
Chunk = tuple[list[Record], list[str]]

_tokenizer: Tokenizer | None = None


def resolve_workers(num_workers: int) -> int:
    """Processes to use; 0 means every core this process may run on."""
    if num_workers:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenise(
    chunks: Iterable[Chunk[Record]], tokenizer: Path, dtype: np.dtype, num_workers: int
) -> Generator[tuple[Record, np.ndarray], None, None]:
    """Each record with the ids of its text (`dtype`, without separators), in the order of `chunks`.

    At most three chunks per worker are in memory. Raises ConfigError when a worker dies.
    """
    if num_workers == 1:
        loaded = load_tokenizer(tokenizer)
        for records, texts in chunks:
            yield from zip(records, (np.array(loaded.encode(text), dtype) for text in texts), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_load, initargs=(tokenizer,)) as pool:
        waiting: deque[tuple[list[Record], Future[list[np.ndarray]]]] = deque()
        try:
            for records, texts in chunks:
                with _interrupts_held():
                    waiting.append((records, pool.submit(_encode, texts, dtype)))
                if len(waiting) > 3 * num_workers:
                    yield from _result(waiting)
            while waiting:
                yield from _result(waiting)
        except BrokenProcessPool:
            raise ConfigError(f"data.num_workers={num_workers}: a tokenising process died, perhaps out of memory; try fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends. Processes that start in it hold it for ever: it is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(waiting: deque) -> Iterator[tuple[Record, np.ndarray]]:
    records, future = waiting.popleft()
    yield from zip(records, future.result(), strict=True)


def _load(path: Path) -> None:
    global _tokenizer
    # A signal to the parent's group would end this process in the middle of a result, for whose rest the parent then waits for ever.
    os.setpgid(0, 0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(path)


def _end_with_parent() -> None:
    """A worker holds its own queue open and would wait for ever on a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [np.array(_tokenizer.encode(text), dtype) for text in texts]
