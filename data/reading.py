"""A source that is read, tokenised and handed on while a run trains on it: document after document, pass after pass, without end.

Every document comes with the place after it, where another reading goes on: so what was handed on never comes again and nothing is
left out, whoever reads on, with however many workers. A disk or network that fails is tried again, from that place.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from configs.schema import ConfigError, InvalidText, SourceConfig
from data.documents import WHOLE, Document, LeftOut, Outage, Share, read_documents
from data.prepare import is_heldout, text_digest
from data.workers import bare_main, end_with_parent, interrupts_held, tokenise

WAITS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
"""Seconds before each new attempt at a source that fails; after the last, five minutes of failing, it is given up."""
STALL_SECONDS = 300.0
"""A source that gives nothing for so long has failed."""

_BATCH_TOKENS = 1 << 16  # handed over at a time
_BATCHES_AHEAD = 64  # so much of it, 4M tokens, waits until it is asked for


class Place(NamedTuple):
    """Between two documents: the pass over the source, counted from 0, where its reader stands (None: before the first), and the share
    of the pass that is read by now (0 where that is not known)."""

    passes: int = 0
    reader: dict[str, Any] | None = None
    share: float = 0.0


class Tokenised(NamedTuple):
    """A document: its ids with separators, uint16 or uint32, its name for messages, and the place after it."""

    tokens: np.ndarray
    name: str
    after: Place


class Coming(Protocol):
    """Documents without end."""

    def __next__(self) -> Tokenised:
        """The next one."""

    def close(self) -> object:
        """Ends the reading."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of a source, and how."""

    source: SourceConfig
    parts: dict[str, int]
    """Its files and their bytes as they were when the run began; the others it is compared with must be the same."""
    share: Share = WHOLE
    tokenizer: Path
    """The tokenizer's file."""
    dtype: str
    """Of token ids."""
    bos_id: int
    eos_id: int
    invalid_utf8: InvalidText
    heldout_fraction: float
    shortest: int
    """Tokens, separators counted, below which documents are left out."""
    longest: int
    """And those above which they are; 0: none."""
    num_workers: int
    """Processes that tokenise; the tokens do not depend on it."""


def check_parts(source: SourceConfig, before: dict[str, int], now: dict[str, int]) -> None:
    """Raises ConfigError, naming the file, where the files of a source are not those they were when the run began."""
    for name in [*before, *now]:
        if before.get(name) == now.get(name):
            continue
        if name not in now:
            problem = "is no longer there"
        elif name not in before:
            problem = "was not there when the run began"
        else:
            problem = f"has {now[name]} bytes, it had {before[name]} when the run began"
        raise ConfigError(f"source {source.name!r}: {name} {problem}; a stream goes on only over the files that it began with")


class Found(NamedTuple):
    """A document that is neither empty nor white space alone, whether it is held out, and the place after it."""

    document: Document
    is_heldout: bool
    after: Place


def read_pass(reading: Reading, place: Place) -> Generator[Found, None, None]:
    """The documents of `reading` from `place` to the end of its pass."""
    reader = read_documents(reading.source, invalid_utf8=reading.invalid_utf8, left_out=LeftOut(), place=place.reader, share=reading.share)
    check_parts(reading.source, reading.parts, reader.parts())
    for document in reader:
        if document.text and not document.text.isspace():
            done, total = reader.progress()
            after = Place(place.passes, reader.place(), done / total if total else 0.0)
            yield Found(document, is_heldout(text_digest(document.text), reading.heldout_fraction), after)


def patiently(open_at: Callable[[Place], Iterator[Found]], place: Place) -> Iterator[Found]:
    """What `open_at(place)` gives, each once, however often it has to be opened again at the last place it gave.

    Raises ConfigError at once where trying again is of no use, as for a file that is gone, and Outage where the last of WAITS did not help.
    """
    failures = 0
    while True:
        documents = open_at(place)
        try:
            while True:
                with _at_most(STALL_SECONDS):
                    found = next(documents, None)
                if found is None:
                    return
                failures, place = 0, found.after
                yield found
        except (Outage, TimeoutError) as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            if failures == len(WAITS):
                raise Outage(f"{error}; given up after {failures + 1} attempts in a row") from error
            time.sleep(WAITS[failures])
            failures += 1


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """A TimeoutError in the midst of what takes longer. In a process's main thread alone, where the readers of a stream work."""

    def stalled(number: int, frame: object) -> None:
        raise TimeoutError(f"nothing came for {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stalled)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(reading: Reading, place: Place) -> Generator[Tokenised, None, None]:
    """The training documents of `reading` from `place` on, without end. Raises ConfigError where a whole pass has none."""
    ends = {"bos_id": reading.bos_id, "eos_id": reading.eos_id}
    last = place.passes
    texts = _texts(reading, place)
    with closing(tokenise(texts, reading.tokenizer, np.dtype(reading.dtype), reading.num_workers, **ends)) as tokenised:
        for (name, after), tokens in tokenised:
            if reading.shortest <= len(tokens) <= (reading.longest or len(tokens)):
                last = after.passes
                yield Tokenised(tokens, name, after)
            elif after.passes > last + 1:
                raise _nothing(reading)


def _texts(reading: Reading, place: Place) -> Iterator[tuple[tuple[str, Place], str]]:
    """The training documents from `place` on, pass after pass: name, the place after it, text."""
    while True:
        any_found = place.reader is not None  # if not in what is left of this pass, then before
        for document, held_out, after in patiently(partial(read_pass, reading), place):
            if not held_out:
                any_found = True
                yield (document.name, after), document.text
        if not any_found:
            raise _nothing(reading)
        place = Place(place.passes + 1)


def _nothing(reading: Reading) -> ConfigError:
    longest = f" and at most {reading.longest}" if reading.longest else ""
    rank, world_size = reading.share
    return ConfigError(
        f"source {reading.source.name!r}: a whole pass over it has no training document of at least {reading.shortest}{longest} tokens "
        f"for rank {rank} of {world_size}"
    )


class ReadAhead:
    """`read(reading, place)` by a process of its own, which is up to 4M tokens ahead. `close` ends the process.

    `__next__` raises what `read` raises, and Outage where the process died.
    """

    def __init__(self, reading: Reading, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self._source, self._ready = reading.source.name, deque[Tokenised]()
        self._pipe, theirs = context.Pipe(duplex=False)
        # No daemon, which may have no workers; ended with this object, at the latest when this process ends.
        process = context.Process(target=_serve, args=(theirs, reading, place))
        with interrupts_held(), bare_main():
            process.start()
        theirs.close()
        self.close = Finalize(self, _end, args=(process,), exitpriority=10)

    def __next__(self) -> Tokenised:
        if not self._ready:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                raise Outage(f"source {self._source!r}: the process that reads it died, perhaps out of memory") from None
            if isinstance(message, Exception):
                raise message
            self._ready.extend(message)
        return self._ready.popleft()


def _end(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()  # its workers end with it
    process.join()


def _serve(pipe: Connection, reading: Reading, place: Place) -> None:
    os.setpgid(0, 0)  # signals to the trainer's group are the trainer's
    threading.Thread(target=end_with_parent, daemon=True).start()
    room = threading.Semaphore(_BATCHES_AHEAD)
    batches: queue.SimpleQueue[tuple[list[Tokenised] | Exception, int]] = queue.SimpleQueue()

    def send() -> None:
        while True:
            batch, size = batches.get()
            try:
                pipe.send(batch)
            except OSError:  # nobody listens any more
                os._exit(1)
            if size:
                room.release(size)
            if isinstance(batch, Exception):
                os._exit(0)

    sender = threading.Thread(target=send)
    sender.start()
    batch: list[Tokenised] = []
    tokens = 0
    try:
        for document in read(reading, place):
            batch.append(document)
            tokens += len(document.tokens)
            if tokens >= _BATCH_TOKENS:
                size = min(_BATCHES_AHEAD, tokens // _BATCH_TOKENS)  # a very long document takes as much room as there is
                for _ in range(size):
                    room.acquire()
                batches.put((batch, size))
                batch, tokens = [], 0
    except Exception as error:
        batches.put((batch, 0))
        batches.put((error if isinstance(error, ConfigError) else RuntimeError(traceback.format_exc()), 0))
    sender.join()
