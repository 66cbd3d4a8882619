"""Runs whose stages have mixes: broken off anywhere they go on to the bit, their figures say what they saw, mistakes end at once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.mapping import from_mapping
from configs.schema import ConfigError, MixConfig, Packing, RunConfig
from data.loader import build_loader
from data.shards import Corpus
from tests.train.helpers import lines, make_run, steps
from train.loop import train

STAGES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("all", 128, {}),
    ("weighted", 128, {"sources": [{"name": "sotu", "weight": 0.75}, {"name": "python", "weight": 0.25}], "packing": "best_fit"}),
    ("long", 256, {"min_document_tokens": 600, "buckets": [{"min_tokens": 2048, "repeat": 4}]}),
    ("separate", 256, {"sources": [{"name": "python"}], "max_document_tokens": 599, "packing": "separate"}),
)
EVERYTHING_KEPT = ("checkpoint.every_steps=1", "checkpoint.keep_last=20", "evaluation.every_steps=0")


def _run(corpus: Path, run_dir: Path, *more: str, **last: object) -> RunConfig:
    """Two steps a stage; `last` changes the mix of the last one."""
    run = make_run(corpus, run_dir, *EVERYTHING_KEPT, *more)
    mixes = [mix for _, _, mix in STAGES]
    mixes[-1] = mixes[-1] | last
    stages = tuple(
        replace(run.stages[0], name=name, tokens=1024, seq_len=seq_len, mix=from_mapping(MixConfig, mix))
        for (name, seq_len, _), mix in zip(STAGES, mixes, strict=True)
    )
    return replace(run, stages=stages)


@pytest.fixture(scope="module")
def whole(corpus, ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    train(_run(corpus, folder), ranks)
    return folder


def test_a_run_of_mixes_broken_off_after_every_step_goes_on_to_the_bit(whole, corpus, ranks, tmp_path):
    for last in range(1, 9):
        train(_run(corpus, tmp_path / "run", f"max_steps={last}"), ranks)
    assert len(steps(whole)) == 8 and steps(tmp_path / "run") == steps(whole)
    kept = ("padding", "tokens_by", "epochs")
    found, expected = (
        [[line[key] for key in kept] for line in lines(folder) if "event" not in line] for folder in (tmp_path / "run", whole)
    )
    assert found == expected


def test_figures_say_what_the_steps_held(whole, corpus):
    """Against the batches of a loader of its own, counted document by document."""
    run, opened, state, figures = _run(corpus, whole), Corpus.open(corpus), None, [line for line in lines(whole) if "event" not in line]
    table, mixes = opened.split("train"), [stage.mix for stage in run.stages]
    for index, stage in enumerate(run.stages):
        loader = build_loader(
            opened, seq_len=stage.seq_len, rows_per_step=stage.rows, micro_batch_rows=1, mix=stage.mix, run_mixes=mixes, state=state
        )
        for step in (2 * index, 2 * index + 1):
            expected: Counter[str] = Counter()
            for batch in loader.next_step():
                for origin, length in zip(batch.documents, batch.cu_seqlens.diff().tolist(), strict=True):
                    if origin.document < 0:
                        expected["padding"] += length
                    else:
                        low = max(low for low in (0, 8192, 32768, 131072) if low <= table.lengths[origin.document])
                        expected.update({f"source/{table.source(origin.document)}": length, f"length/{low}": length})
            line = figures[step]
            assert line["padding"] == expected.pop("padding", 0) / 512 and line["epochs"] == loader.epochs()
            assert {key: number for key, number in line["tokens_by"].items() if number} == expected
        state = loader.state_dict()
    assert all(line["padding"] > 0 and line["tokens_by"]["source/sotu"] == 0 for line in figures[6:])


def test_what_a_stage_leaves_out_it_has_of_the_run(corpus, tmp_path):
    more = ["mix.packing=best_fit", "mix.min_document_tokens=64", "stages.0.mix.min_document_tokens=128"]
    (stage,) = make_run(corpus, tmp_path, *more).stages
    assert stage.mix.packing is Packing.BEST_FIT and stage.mix.min_document_tokens == 128


def test_a_mix_of_a_later_stage_that_the_corpus_does_not_have_ends_before_anything_is_written(corpus, ranks, tmp_path):
    message = r"^stages.3.mix.sources.0.name=pyton: no such source, did you mean 'python'\?; the corpus has sotu, python$"
    with pytest.raises(ConfigError, match=message):
        train(_run(corpus, tmp_path / "run", sources=[{"name": "pyton"}]), ranks)
    assert not (tmp_path / "run").exists()


def test_a_branch_whose_mixes_tell_more_apart_is_refused(whole, corpus, ranks, tmp_path):
    resume = f"resume={whole}/checkpoints/step_00000004"
    with pytest.raises(
        ConfigError, match=r"^resume: the saved stream has documents in pools .*, python 2048-, the mixes of this run make "
    ):
        train(_run(corpus, tmp_path / "run", resume, max_document_tokens=5000), ranks)
