"""All cases of a training benchmark, one after the other; what was measured is written after each."""

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.figures import short_count
from scripts.training_benchmark.cases import Case
from scripts.training_benchmark.measure import Result, measure
from scripts.training_benchmark.report import write


def train_benchmark(cases: Sequence[Case], folder: Path, facts: Mapping[str, str]) -> list[Result]:
    """All results; `folder` then holds the files, and what each case left behind in `train/`."""
    shutil.rmtree(folder / "train", ignore_errors=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="training_benchmark-") as scratch:
        for number, case in enumerate(cases):
            length = case.stage.seq_len
            result = measure(case, folder / "train" / f"{number:02d}-{short_count(length)}-{case.row.value}", Path(scratch))
            results.append(result)
            write(folder, results, facts)
            found = result.problem or "{:,.0f} tokens/s ({:,.0f} to {:,.0f})".format(*result.tokens_per_second)
            print(f"{length:,} tokens, {case.attention}, {case.row.value}: {found}", file=sys.stderr, flush=True)
    return results
