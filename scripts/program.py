"""What commands share: how they end when they are interrupted, and how a word of the command line becomes a setting."""

import re
import signal
import sys
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupt(BaseException):
    """Raised where a signal finds the program: blocks that clean up after themselves do so on the way out."""


def run(main: Callable[[], None], *, interrupted: str) -> None:
    """Calls `main`. A first SIGINT, SIGTERM or SIGHUP ends it with one line that says what became of the work, `interrupted`.

    The exit status is then 128 + the signal's number, as a shell counts. After that line a second signal ends the process at once.
    """
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # ignored under nohup and in background jobs
    for number in heeded:
        signal.signal(number, _interrupt)
    try:
        main()
    except _Interrupt as interrupt:
        number = interrupt.args[0]
        print(f"interrupted by {signal.Signals(number).name}: {interrupted}", file=sys.stderr, flush=True)
        for each in heeded:
            signal.signal(each, signal.SIG_DFL)  # what libraries do at exit may take long, or hang
        raise SystemExit(128 + number) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # cleaning up is not interrupted
    raise _Interrupt(number)


def first_word_is(key: str) -> None:
    """Where the command line begins with a path, it becomes the setting `key`: `PROGRAM FOLDER …` is `PROGRAM key=FOLDER …`."""
    word = next(iter(sys.argv[1:]), "")
    if word and not word.startswith("-") and (word.startswith(("/", ".")) or "=" not in word):
        sys.argv[1] = f"{key}={quoted(word)}"


def quoted(path: str) -> str:
    """A text as Hydra's grammar takes it: in quotes, where a quote is escaped, and backslashes before one are doubled."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), path) + "'"
