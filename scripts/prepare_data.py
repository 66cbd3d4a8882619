"""Prepare a corpus: `python -m scripts.prepare_data data=bundled`.

Reads the documents of `data.sources`, holds some out, trains or loads the tokenizer and writes shards into `data.prepared_dir`.
A finished corpus of the same config is left as it is; overwrite=true builds it again. One that was killed goes on where it was.
`python -m scripts.inspect_data FOLDER` looks into the result; docs/data.md says how each kind of text is handled.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from configs.registry import command, show
from configs.schema import PrepareConfig
from data.documents import describe_left_out
from data.manifest import SPLITS, Manifest
from data.prepare import Progress as Report
from data.prepare import find_prepared, prepare
from data.shards import Corpus, length_histogram
from scripts.program import run


@command(PrepareConfig, config_name="prepare_data")
def main(config: PrepareConfig) -> None:
    """Prepares the corpus and says what is in it."""
    reused = not config.overwrite and find_prepared(config.data) is not None
    with _progress() as report:
        manifest = prepare(config.data, overwrite=config.overwrite, progress=report)
    title = f"{config.data.prepared_dir}: {'already prepared' if reused else 'prepared'}"
    show("\n".join([title, *_summary(manifest, Corpus.open(config.data.prepared_dir))]))


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar with MB/s and the time that is left on a terminal, nothing elsewhere. It goes to stderr; stdout carries the summary."""
    console = Console(stderr=True)
    figures = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *figures)
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=60) as bar:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:  # what an earlier start has done counts, but not for the speed
                tasks[phase] = bar.add_task(phase, total=None, completed=done)
            bar.update(tasks[phase], completed=done, total=total or None)

        yield report


def _summary(manifest: Manifest, corpus: Corpus) -> Iterator[str]:
    for split in SPLITS:
        counts = manifest.splits[split]
        yield (
            f"{split:8} {counts.documents:>9,} documents {counts.tokens:>13,} tokens {counts.bytes / 1e6:>10,.1f} MB of text, "
            f"longest {counts.longest:,} tokens"
        )
    for source in manifest.sources:
        parts = (manifest.splits[split].by_source[source] for split in SPLITS)
        yield (
            f"  {source}: "
            + ", ".join(f"{part['documents']:,} documents {part['tokens']:,} tokens" for part in parts)
            + " (train, heldout)"
        )
    for reason, count in manifest.dropped.items():
        if count:
            yield f"left out: {describe_left_out(reason, count, manifest.dropped_names.get(reason, []))}"
    yield f"tokenizer: {manifest.tokenizer_file}, {manifest.vocab_size:,} tokens, hash {manifest.tokenizer_hash}"
    bins = {split: {low: documents for low, documents, _ in length_histogram(corpus.split(split).lengths)} for split in SPLITS}
    yield f"{'tokens from':>12} {'train':>9} {'heldout':>9}"
    for low in sorted(set().union(*bins.values())):
        yield f"{low:>12,} {bins['train'].get(low, 0):>9,} {bins['heldout'].get(low, 0):>9,}"


if __name__ == "__main__":
    run(main, interrupted="what was finished is kept, and the same command goes on from there")
