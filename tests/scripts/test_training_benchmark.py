"""The training benchmark: its command line, its cases, what it makes of what they leave behind, and the steps themselves on a CPU."""

import csv
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from configs.registry import REPOSITORY, compose, override
from configs.schema import ConfigError, MixConfig, TrainBenchmarkConfig, TrainingRow
from data.loader import build_loader
from data.prepare import prepare
from model import host_memory
from scripts import benchmark as door
from scripts.training_benchmark import measure as measuring
from scripts.training_benchmark.cases import Case, all_cases
from scripts.training_benchmark.corpus import make_corpus
from scripts.training_benchmark.measure import LOG_FILE, Result, measure
from scripts.training_benchmark.report import markdown, series, to_csv
from scripts.training_benchmark.steps import STEPS, machine
from tests.train.helpers import corpus_config

FACTS = {"torch": "2", "date": "2026-01-01", "command": "python -m scripts.benchmark train"}


def config(*overrides: str) -> TrainBenchmarkConfig:
    small = ["model=tiny", "device=cpu", "attention.block_size=64", 'attentions=["full","moba(64, 3)"]']
    return compose(TrainBenchmarkConfig, config_name="benchmark_train", overrides=[*small, *overrides])


# --- the command line ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lengths=[]"], r"lengths=\[\]: must hold at least one"),
        (["lengths=[64,64]"], r"lengths=\[64, 64\]: must not hold the same twice"),
        (['attentions=["moba(5)"]'], r"attentions.0: rule='moba\(5\)'"),
        (["rows=[transfomers]"], r"rows.0='transfomers': no such choice, did you mean 'transformers'\?"),
        (["steps=0"], "steps=0: must be at least 1"),
        (["real_data=true", "data.streaming=true"], "data.streaming=True: real_data=true reads a prepared corpus"),
        (["profile.steps=1..2"], "profile.steps=1..2: watched steps are slower than those that count"),
        (["changes=[{from_lenght: 5}]"], "changes.0.from_lenght: no such key, did you mean 'changes.0.from_length'"),
        (["parallel.zero=1"], "parallel.zero: no such key, did you mean 'parallel.zero_stage'"),
    ],
)
def test_mistakes_name_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_settings_are_laid_over_a_config():
    changed = override(config(), ["parallel.zero_stage=2", "attention.topk=5", "steps=1"])
    assert (changed.parallel.zero_stage, changed.stages[0].attention.topk, changed.steps) == (2, 5, 1)
    for setting, message in (("parallel.zero=2", "no such key, did you mean"), ("steps", "must be key=value|cannot be read")):
        with pytest.raises(ConfigError, match=message):
            override(config(), [setting])


# --- cases ---------------------------------------------------------------------------------------------------------------------------


def shown(cases: list[Case]) -> list[tuple[str, int, int, str]]:
    return [(case.row.value, case.stage.seq_len, case.stage.rows, case.attention) for case in cases]


def test_cases_are_lengths_by_attentions_and_the_peer_at_each():
    asked = config("lengths=[1024,256]", 'attentions=["full","moba","last 1 full, rest moba"]', "dense_up_to=512", "batch_tokens=512")
    hybrid = "last 1 full, rest moba"
    assert shown(all_cases(asked)) == [
        ("framework", 256, 2, "full"),
        ("framework", 256, 2, "moba(64, 3)"),
        ("framework", 256, 2, hybrid),
        ("transformers", 256, 2, "full"),
        ("framework", 1024, 1, "moba(64, 3)"),
        ("framework", 1024, 1, hybrid),
    ]


def test_a_case_is_steps_alone_and_fits_any_schedule():
    asked = config("lengths=[4096]", "optim.warmup_tokens=1e12", "evaluation.rows=8", "logging.wandb=true", "warmup_steps=1", "steps=4")
    run = all_cases(asked)[0].run
    assert (run.total_steps, run.evaluation.rows, run.logging.wandb, run.model.max_seq_len) == (5, 0, False, 4096)


def test_several_ranks_have_steps_to_trace_and_the_peer_is_alone():
    asked = config("lengths=[128]", "attentions=full", "warmup_steps=1", "steps=3", "num_ranks=2", "parallel.sequence_parallel=2")
    ours, peer = all_cases(asked)
    assert (ours.num_ranks, ours.run.parallel.sequence_parallel, ours.run.total_steps) == (2, 2, 6)
    assert (peer.num_ranks, peer.run.parallel.sequence_parallel, peer.run.total_steps) == (1, 1, 4)
    found = result(ours, [9, 1, 2, 3, 50, 50], spent={"communication": 0.25, "communication_exposed": 0.125, "communication_problem": None})
    assert [line["step_seconds"] for line in found.steps] == [1, 2, 3]
    text = markdown([found, result(peer, [1, 1, 1, 1])], FACTS)
    assert series([found])["communication (share of a step)"] == [("framework", "full", [(128, 0.25)])]
    assert text.count(" 25.0% (12.5%) |") == 1 and "share of 2 more steps" in text
    assert next(csv.DictReader(to_csv([found], FACTS).splitlines()))["communication_exposed"] == "0.125"


def test_changes_hold_from_their_length_on():
    asked = config(
        "lengths=[128,256,512]",
        'changes=[{from_length: 256, settings: ["steps=2","attention.topk=2"]},{from_length: 512, settings: ["steps=1"]}]',
        "attentions=moba",
        "rows=framework",
    )
    runs = [case.run for case in all_cases(asked)]
    assert [run.steps for run in runs] == [5, 2, 1]
    assert [run.stages[0].attention.topk for run in runs] == [3, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['attentions=["full"]', "dense_up_to=64", "lengths=[128]"], r"dense_up_to=64: leaves none of lengths=\[128\]"),
        (["num_ranks=2", "lengths=[128]", "batch_tokens=2048", "parallel.micro_batch_rows=3"], "full at 128 tokens: .* 2 ranks"),
        (['attentions=["last 9 full, rest moba"]', "lengths=[128]"], "attention.rule|rule="),
        (["lengths=[128]", 'changes=[{settings: ["parallel.zero_stage=9"]}]'], "parallel.zero_stage=9: accepted"),
        (["lengths=[128]", "parallel.loss=liger"], "framework, full at 128 tokens: parallel.loss=liger: the device is cpu; accepted: cuda"),
        (
            ["lengths=[128]", 'attentions=["moba(64, 2)"]', "attention.backend=triton"],
            r"framework, moba\(64, 2\) at 128 tokens: stages.0.attention.backend=triton: .* q is on cpu",
        ),
        (["lengths=[128]", "model.key_conv=3"], r"transformers, full at 128 tokens: model.key_conv=3: no class .* rows=\[framework\]"),
        (
            ["lengths=[128]", "stages.0.rope.nope='last 1'"],
            "transformers, full at 128 tokens: stages.0.rope: no class .* without positions",
        ),
        (["lengths=[128]", "real_data=true", "data.prepared_dir=nowhere"], "nowhere"),
    ],
)
def test_what_training_refuses_is_refused_before_the_first_case(overrides, message):
    with pytest.raises(ConfigError, match=message):
        all_cases(config(*overrides))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "model=tiny", "lengths=64", "device=cuda"], "device=cuda: rank 0 of this machine needs a GPU"),
        (["train", "model=tiny", "lengths=64", "device=cpu", "parallel.loss=liger"], "parallel.loss=liger: the device is cpu"),
        (["train", "model=tiny", "lengths=64", "device=cpu", "activation.rule=offload"], "host memory for 1 ranks"),
        (
            ["equality", 'settings=["model=tiny","device=cuda","stages.0.seq_len=128","attention.block_size=64"]', "steps=1"],
            "1 rank, ZeRO 1: device=cuda: rank 0 of this machine needs a GPU",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("train.memory.free_host_memory", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, f"output_dir={tmp_path / 'new'}"])
    with pytest.raises(SystemExit) as end:
        door.main()
    assert end.value.code == 2 and not (tmp_path / "new").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_the_mix_is_of_a_real_corpus_alone():
    asked = config("lengths=[128]", "mix.sources=[{name: sotu, weight: 1}]")
    assert all(case.stage.mix == MixConfig() for case in all_cases(asked))


def test_every_comparison_composes(monkeypatch):
    monkeypatch.setattr("train.memory.free_host_memory", lambda: 10**12)  # of the machines that they are written for
    for path in sorted((REPOSITORY / "configs" / "comparison").glob("*.yaml")):
        cases = all_cases(compose(TrainBenchmarkConfig, config_name="benchmark_train", overrides=[f"comparison={path.stem}"]))
        assert all(case.run.steps >= 1 for case in cases)
    reach = [case for case in cases if case.row is TrainingRow.FRAMEWORK]
    assert [(case.stage.seq_len >> 10, case.attention) for case in reach] == [
        (8, "full"),
        *((length, "moba(512, 3)") for length in (8, 128, 256, 512, 1024)),
    ]


def test_rows_of_the_made_corpus_are_whole_documents(tmp_path):
    make_corpus(tmp_path / "made", documents=5, document_tokens=96, vocab_size=400)
    loader = build_loader(tmp_path / "made", seq_len=96, rows_per_step=2, micro_batch_rows=2)
    for _ in range(4):  # past the end of an epoch
        (batch,) = loader.next_step()
        assert batch.cu_seqlens.tolist() == [0, 96, 192] and batch.tokens.max() < 400 and len(batch.tokens.unique()) > 50


# --- what cases leave behind -----------------------------------------------------------------------------------------------------------


def result(
    case: Case,
    seconds: list[float],
    *,
    recompiles: list[int] | None = None,
    mfu: float | None = 0.4,
    problem: str = "",
    spent: dict | None = None,
) -> Result:
    lines = [
        {"step": n, "step_seconds": s, "mfu_dense_equivalent": mfu, "mfu_executed": mfu, "memory_gib": 10.0 + n, "data_wait": 0.01 * n}
        for n, s in enumerate(seconds)
    ]
    for line, count in zip(lines, recompiles or []):
        line["recompiles"] = count
    end = {} if problem else {"program": "transformers 5", "device": "A GPU", "host_gib": 3.0, "pinned_gib": 0.0, **(spent or {})}
    return Result(case=case, lines=tuple(lines), problem=problem, end=end)


def test_pinned_memory_is_torchs_and_our_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(host_memory.page_locked, "peak", 3 * 2**30)
    assert machine(torch.device("cuda"))["pinned_gib"] == 4
    assert machine(torch.device("cpu"))["pinned_gib"] is None


def test_the_report_says_what_was_measured():
    full, moba, peer = all_cases(
        config("lengths=[1024]", 'attentions=["full","moba(64, 2)"]', "batch_tokens=8192", "warmup_steps=2", "steps=3")
    )
    results = [
        result(full, [9, 8, 2, 4, 1], recompiles=[3, 2, 0, 1, 0]),
        result(moba, [9, 1], problem="out of memory"),
        result(peer, [2, 2, 2, 2, 2], mfu=None),
    ]
    tokens = full.stage.batch_tokens
    assert tokens == 8192
    assert results[0].tokens_per_second == (tokens / 2, tokens / 4, tokens / 1)
    assert results[0].recompiles == 1 and results[2].recompiles is None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(results, FACTS).splitlines() if line.startswith("| 1K")]
    assert rows[0][1:] == ["full", "framework", "4,096 (2,048 to 8,192)", "0.400", "0.400", "14.0", "3.0", "1", "3.0%", "2", "-"]
    assert rows[1][1:5] == ["moba(64, 2)", "framework", "out of memory", "-"]
    assert rows[2][1:7] == ["full", "transformers", "4,096 (4,096 to 4,096)", "-", "-", "14.0"]
    values = list(csv.DictReader(to_csv(results, FACTS).splitlines()))
    assert [(line["program"], line["problem"], line["tokens_per_second"]) for line in values] == [
        ("framework", "", "4096.0"),
        ("framework", "out of memory", ""),
        ("transformers", "", "4096.0"),
    ]
    panels = series(results)
    assert panels["tokens/s"] == [("framework", "full", [(1024, 4096.0)]), ("transformers", "full", [(1024, 4096.0)])]
    assert panels["MFU, executed"] == [("framework", "full", [(1024, 0.4)])]
    assert panels["peak memory (GiB)"] == [(program, "full", [(1024, 14.0)]) for program in ("framework", "transformers")]
    assert list(panels) == ["tokens/s", "MFU, executed", "peak memory (GiB)"]  # of one rank; what nothing has is no panel


@pytest.mark.parametrize(
    ("status", "log", "problem"),
    [
        (1, "step\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB. GPU 0\n[rank0] gone\n", "out of memory: Tried 2 GiB"),
        (1, "torch.AcceleratorError: CUDA error: out of memory\n", "out of memory: torch.AcceleratorError: CUDA error"),
        (-9, "", "ended by SIGKILL"),
        (2, "a warning\nerror: model.key_conv=3: no class has it\n", "refused: model.key_conv=3: no class has it"),
        (1, "Traceback\nValueError: odd\n\n", "failed: ValueError: odd"),
        (1, "", "failed: exit status 1"),
    ],
)
def test_a_problem_is_one_line(status, log, problem):
    assert measuring._problem(status, log) == problem


def test_a_peer_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "is_installed", lambda: False)
    peer = all_cases(config("lengths=64", "rows=transformers"))[0]
    assert measure(peer, tmp_path / "case", tmp_path).problem == "not installed" and list(tmp_path.iterdir()) == []


def test_a_case_whose_processes_fail_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_PROGRAM", "no_such_program")
    found = measure(all_cases(config("lengths=[64]"))[0], tmp_path / "case", tmp_path)
    assert "No module named no_such_program" in found.problem and found.lines == ()
    assert "out of memory" not in markdown([found], FACTS) and "No module named" in markdown([found], FACTS)
    assert len(list(csv.DictReader(to_csv([found], FACTS).splitlines()))) == 1 and series([found]) == {}


@pytest.mark.parametrize(
    ("problem", "failed"),
    [("", False), ("out of memory: Tried 2 GiB", False), ("not installed", False), ("refused: x", True), ("ended by SIGKILL", True)],
)
def test_the_status_is_1_where_a_case_failed_and_memory_is_a_result(tmp_path, monkeypatch, capsys, problem, failed):
    case = all_cases(config("lengths=[64]"))[0]
    monkeypatch.setattr(door, "train_benchmark", lambda *_: [result(case, [1] * 7, problem=problem)])
    monkeypatch.setattr(sys, "argv", ["benchmark", "train", "model=tiny", "device=cpu", f"output_dir={tmp_path}"])
    if failed:
        with pytest.raises(SystemExit) as end:
            door.main()
        assert end.value.code == 1
    else:
        door.main()
    assert "# Training on" in capsys.readouterr().out


# --- the steps -------------------------------------------------------------------------------------------------------------------------


def test_every_row_has_its_steps():
    assert list(STEPS) == list(TrainingRow)


def test_the_command_measures_training_and_its_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    keys = ["model=tiny", "device=cpu", "lengths=64", 'attentions="moba(16, 2)"', "batch_tokens=256", "warmup_steps=1", "steps=2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "train", *keys, f"output_dir={tmp_path}"])
    door.main()
    said = capsys.readouterr()
    assert said.out.count("| 64 × 4") == 2 and "64 tokens, moba(16, 2), framework: " in said.err
    assert (tmp_path / "train.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "train.md").read_text().count("| 64 × 4") == 2
    values = list(csv.DictReader((tmp_path / "train.csv").open()))
    assert [line["problem"] for line in values] == ["", ""] and all(float(line["tokens_per_second"]) > 0 for line in values)
    for folder in ("00-64-framework", "01-64-transformers"):
        lines = [json.loads(line) for line in (tmp_path / "train" / folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 3] and lines[-1]["event"] == "end"
        # Of random weights on random tokens, one of which is as likely as another.
        assert abs(lines[0]["loss"] - math.log(512)) < 0.1


@pytest.mark.slow
def test_several_ranks_and_a_real_corpus(tmp_path):
    corpus = tmp_path / "corpus"
    prepare(corpus_config(corpus))
    asked = config(
        "lengths=128", "rows=framework", "attentions=full", "num_ranks=2", "steps=1", "real_data=true", f"data.prepared_dir={corpus}"
    )
    (case,) = all_cases(replace(asked, warmup_steps=1))
    found = measure(case, tmp_path / "case", tmp_path)
    assert found.problem == "", (tmp_path / "case" / LOG_FILE).read_text()
    assert len(found.steps) == 1 and next(iter(found.lines[0]["tokens_by"])).startswith("source/")
    assert len(found.lines) == 4 and 0 < found.end["communication"] < 1 and found.end["communication_exposed"] is None
    assert len(list((tmp_path / "case").glob("trace_rank_0000?.json.gz"))) == 2
