"""The equality benchmark: which trainings it makes of a command line, what it says of their figures, and the whole on gloo ranks."""

import csv
import sys
from dataclasses import replace

import pytest

from configs.registry import REPOSITORY, compose
from configs.schema import ConfigError, EqualityBenchmarkConfig, LayoutConfig, RunConfig
from data.prepare import prepare
from scripts import benchmark as door
from scripts.training_benchmark import equality
from scripts.training_benchmark.equality import Trained, all_trainings, equality_benchmark, is_wrong, markdown, to_csv
from tests.train.helpers import corpus_config

FACTS = {"torch": "2", "device": "A GPU", "date": "2026-01-01", "command": "python -m scripts.benchmark equality"}
TINY = ("model=tiny", "device=cpu", "stages.0.seq_len=128", "stages.0.batch_tokens=512", "stages.0.tokens=8192", "attention.block_size=32")


def config(*overrides: str, settings: tuple[str, ...] = TINY) -> EqualityBenchmarkConfig:
    words = ", ".join(f'"{setting}"' for setting in settings)
    return compose(EqualityBenchmarkConfig, config_name="benchmark_equality", overrides=[f"settings=[{words}]", "steps=12", *overrides])


def test_each_layout_is_a_training_and_the_first_is_trained_again_in_another_order():
    trainings = all_trainings(config("elastic=[{num_ranks: 2, zero_stage: 3},{num_ranks: 1}]"))
    assert [training.name for training in trainings] == [
        "1 rank, ZeRO 1",
        "1 rank, ZeRO 1, micro-batches of 2 rows",
        "2 ranks, ZeRO 1",
        "2 ranks, ZeRO 1, SP 2",
        "killed: 2 ranks, ZeRO 3 → 1 rank, ZeRO 1",
    ]
    assert [training.is_noise for training in trainings] == [False, True, False, False, False]
    assert [training.run.parallel.sequence_parallel for training in trainings] == [1, 1, 1, 2, 1]
    assert [training.run.parallel.micro_batch_rows for training in trainings] == [1, 2, 1, 1, 1]
    assert [[launch.layout.num_ranks for launch in training.launches] for training in trainings] == [[1], [1], [2], [2], [2, 1]]
    assert {training.run.last_step for training in trainings} == {12}
    rows = all_trainings(config(settings=(*TINY, "parallel.micro_batch_rows=2")))[1]
    assert rows.run.parallel.micro_batch_rows == 1
    assert all_trainings(config("layouts=[{num_ranks: 4}]"))[1].name == "4 ranks, ZeRO 1, again"


def test_nothing_is_saved_but_what_a_killed_launch_leaves_to_the_next():
    *whole, killed = all_trainings(config("elastic=[{num_ranks: 2},{num_ranks: 1},{num_ranks: 2}]"))
    saves = [compose(RunConfig, config_name="train", overrides=list(launch.settings)).checkpoint for launch in killed.launches]
    assert [launch.killed_after for launch in killed.launches] == [4, 8, 0]
    assert [(save.every_steps, save.background, save.at_end) for save in saves] == [(3, False, False), (7, False, False), (0, True, False)]
    for training in whole:
        assert (training.run.checkpoint.every_steps, training.run.checkpoint.at_end, training.run.evaluation.rows) == (0, False, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["elastic=[{},{},{},{},{},{},{}]"], "steps=12: must be at least 14, two for each launch of elastic"),
        (["patience=0"], "patience=0: must be at least 1"),
        (["layouts=[]"], r"layouts=\[\]: must hold at least one"),
        (["layouts=[{zero_stage: 4}]"], "zero_stage=4: must be 0, 1, 2 or 3"),
        (["layouts=[{num_ranks: 1},{num_ranks: 3}]"], "3 ranks, ZeRO 1: .*512.* 3 ranks"),
        (["layouts=[{num_ranks: 1},{num_ranks: 2, sequence_parallel: 4}]"], "2 ranks, ZeRO 1, SP 4: parallel.sequence_parallel=4"),
        (["elastic=[{num_ranks: 1}]"], "elastic=one layout: must hold at least two"),
        (["elastic=[{num_ranks: 2},{num_ranks: 3}]"], "3 ranks, ZeRO 1: .*512"),
        (["steps=99"], "steps=99: the run has 16"),
        (['settings=["model.hiden_size=5"]'], "model.hiden_size: no such key"),
    ],
)
def test_what_training_refuses_is_refused_before_the_first(overrides, message):
    with pytest.raises(ConfigError, match=message):
        all_trainings(config(*overrides))


def test_the_report_sets_losses_side_by_side():
    first, again, other, *_ = all_trainings(config("layouts=[{num_ranks: 1},{num_ranks: 2}]", "steps=2"))

    def trained(training, losses, norms, code):
        rows = {"tokens_by": {"source/code": code}, "padding": 0.0, "epochs": {"code": 0.1}, "tokens_per_second": 9.0}
        lines = [{"step": n + 1, "loss": loss, "grad_norm": norm, **rows} for n, (loss, norm) in enumerate(zip(losses, norms))]
        return Trained(training=training, lines=tuple(lines))

    results = [
        trained(first, [6.0, 5.0], [2.0, 4.0], 7),
        trained(again, [6.0, 5.001], [2.0, 4.0], 7),
        trained(other, [6.01, 5.0], [2.0, 2.0], 8),  # half a gradient, and other rows
        Trained(training=replace(other, name="another"), problem="refused: too large"),
    ]
    assert [is_wrong(result, results[0]) for result in results] == [False, False, True, True]
    text = markdown(results, FACTS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[3][1:] == ["the same", "-", "1.0e-03", "0.0e+00"]
    assert rows[4] == ["2 ranks, ZeRO 1", "OTHERS", "-", "1.0e-02", "5.0e-01"]
    assert rows[5] == ["another", "-", "-", "refused", "-"]
    assert rows[-1] == ["2", "5.000000", "5.001000", "5.000000"]
    assert "rounding alone comes to: 1.0e-03 nats" in text and "another: refused: too large" in text
    values = list(csv.DictReader(to_csv(results, FACTS).splitlines()))
    assert len(values) == 6 and values[-1]["grad_norm"] == "2.0" and {line["date"] for line in values} == {"2026-01-01"}


def test_a_layout_says_what_it_is():
    assert str(LayoutConfig(num_ranks=4, zero_stage=3, sequence_parallel=2)) == "4 ranks, ZeRO 3, SP 2"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('odd', flush=True); raise SystemExit(3)", "training ended with status 3 before its last step"),
        (
            "print('odd\\nerror: model.hidden_size=5: too small', flush=True); raise SystemExit(2)",
            "1 rank, ZeRO 1: model.hidden_size=5: too small",
        ),
        ("import time; print('odd', flush=True); time.sleep(60)", "hung: no step after step 0 in patience=1 s"),
    ],
)
def test_a_launch_that_fails_or_hangs_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys, program, message):
    monkeypatch.setattr(equality, "deepspeed_command", lambda *_, **__: [sys.executable, "-c", program])
    with pytest.raises(ConfigError, match=message):
        equality_benchmark(all_trainings(config()), tmp_path, FACTS, patience=1)
    assert " s, failed; the end of " in (said := capsys.readouterr().err) and "\nodd\n" in said


@pytest.fixture
def corpus(tmp_path):
    prepare(corpus_config(tmp_path / "corpus"))
    return tmp_path / "corpus"


@pytest.mark.slow
def test_ranks_zero_sequence_parallelism_and_a_kill_change_nothing_through_the_cli(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    settings = ", ".join(f'"{setting}"' for setting in (*TINY, f"data.prepared_dir={corpus}"))
    words = ["layouts=[{num_ranks: 1},{num_ranks: 2, zero_stage: 3, sequence_parallel: 2}]", "elastic=[{num_ranks: 2},{num_ranks: 1}]"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "equality", f"settings=[{settings}]", "steps=16", *words, f"output_dir={tmp_path}"])
    door.main()  # with another status than 0 it would raise
    values = list(csv.DictReader((tmp_path / "equality.csv").open()))
    losses = {name: [float(line["loss"]) for line in values if line["layout"] == name] for name in {line["layout"] for line in values}}
    assert len(losses) == 4 and all(len(found) == 16 for found in losses.values())
    first = losses["1 rank, ZeRO 1"]
    assert first[-1] < first[0] - 0.3
    for found in losses.values():
        assert found == pytest.approx(first, abs=5e-6)
    said = capsys.readouterr()
    (killed,) = [line for line in said.out.splitlines() if line.startswith("| killed: ")]
    assert "| the same | step 7 " in killed
    assert "2 ranks, ZeRO 1, launch 1 of 2: " in said.err and said.err.count(" s of them in its ") == 5
    assert not list(tmp_path.rglob("step_*"))
