"""The whole road on real text: prepare a corpus, train full attention and MoBA, evaluate both, report.

    bash scripts/quickstart.sh [key=value ...]          installs into .venv first
    python -m scripts.quickstart [key=value ...]

key=value are overrides of both training runs, such as stages.0.tokens=2e6; those of data go to the preparation too.
Every step is a command of its own that knows what is done already: run again, this goes on where it stopped. Results lie in
outputs/quickstart; move that folder away to start anew or with other overrides.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.mapping import first_difference, to_mapping
from configs.registry import REPOSITORY, compose, fail
from configs.schema import ConfigError, RunConfig
from scripts.figures import plot_losses, plot_positions, read_metrics
from scripts.launching import deepspeed_command, last_error, lock_log, start, stop, wait_for_heirs
from scripts.program import run as run_program
from train.report import main_table
from train.run_dir import CONFIG_FILE, is_trained, write_atomically

FOLDER = Path("outputs/quickstart")
ARMS = {"full": "attention.rule=full", "moba": "attention.rule=moba"}
_OURS = ("experiment", "attention", "attention.rule", "name", "run_dir", "resume", "max_steps")
_EVERY_SECONDS = 15  # between two lines of progress


def main(arguments: list[str]) -> None:
    """Runs what is not done yet and prints where the report is. A user's mistake ends in one line and exit status 2."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__, end="")
        return
    os.chdir(REPOSITORY)
    try:
        runs = _plan(arguments)
    except ConfigError as error:
        fail(str(error))
    started = time.perf_counter()
    _prepare(arguments)
    _train(runs, arguments)
    _evaluate(runs)
    report = _write_report(runs, time.perf_counter() - started)
    _say(f"done in {time.perf_counter() - started:.0f} s")
    print("\n".join(str(path) for path in (report, FOLDER / "loss.png", FOLDER / "position.png")))


def _plan(overrides: list[str]) -> dict[str, RunConfig]:
    """The run of each arm. Raises ConfigError for overrides that are ours to set, or that are not those the folder was made with."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in _OURS:
            raise ConfigError(f"{override}: the quickstart sets {key} itself; train.main takes every key")
    runs = {arm: compose(RunConfig, config_name="train", overrides=_arm_overrides(arm, overrides)) for arm in ARMS}
    if _label(runs["full"]) == _label(runs["moba"]):
        raise ConfigError(f"{' '.join(overrides)}: give both runs the attention {_label(runs['full'])}; there is nothing to compare")
    for run in runs.values():
        file = Path(run.run_dir) / CONFIG_FILE
        if file.is_file() and (difference := first_difference(json.loads(file.read_text()), to_mapping(run), "")):
            key, there, here = difference
            raise ConfigError(
                f"{key.removeprefix('.')}={here}: {FOLDER} holds a quickstart with {there}; repeat its overrides, or move the folder away"
            )
    return runs


def _arm_overrides(arm: str, overrides: list[str]) -> list[str]:
    return ["experiment=quickstart", ARMS[arm], f"name=quickstart_{arm}", f"run_dir={FOLDER / arm}", *overrides, "logging.progress=false"]


def _say(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)


def _run(
    commands: Mapping[str, list[str]],
    *,
    environment: Mapping[str, str],
    logs: Mapping[str, Path] | None = None,
    progress: Callable[[], str] | None = None,
) -> tuple[str, int] | None:
    """Runs commands side by side, each with all its output in its log where it has one. Returns the first that fails and its status.

    When one fails, or this process is interrupted, the others are told to end, and have ended (training saves first).
    """
    started: dict[str, subprocess.Popen[bytes]] = {}
    said = time.monotonic()
    try:
        for name, command in commands.items():
            started[name] = _start(command, environment, logs[name] if logs else None)
        while True:
            running = [process.poll() is None for process in started.values()]
            failed = next(((name, process.returncode) for name, process in started.items() if process.returncode), None)
            if failed or not any(running):
                return failed
            time.sleep(0.1)
            if progress and time.monotonic() - said > _EVERY_SECONDS:
                _say(progress())
                said = time.monotonic()
    finally:
        for process in started.values():
            stop(process)
        for name, process in started.items():
            process.wait()
            if logs:
                wait_for_heirs(logs[name])


def _start(command: list[str], environment: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    if log is None:
        return start(command, environment, None)
    file = lock_log(log, wait=False)
    if file is None:
        fail(f"{log}: another quickstart is writing it; wait for it to end")
    with file:
        return start(command, environment, file)


def _groups(arms: list[str]) -> tuple[list[list[str]], dict[str, str]]:
    """Arms that compute together, and their environment: on a GPU one after the other, on CPUs side by side with half the cores each."""
    if torch.cuda.is_available():
        return [[arm] for arm in arms], {}
    return [arms] if arms else [], {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // len(ARMS)))}


def _prepare(overrides: list[str]) -> None:
    _say("preparing the corpus")
    of_data = [override for override in overrides if override.lstrip("+~").startswith(("data=", "data."))]
    if failed := _run({"preparation": [sys.executable, "-m", "scripts.prepare_data", "data=bundled", *of_data]}, environment={}):
        raise SystemExit(failed[1])


def _train(runs: Mapping[str, RunConfig], overrides: list[str]) -> None:
    """What is not trained yet, through the deepspeed CLI."""
    groups, environment = _groups([arm for arm, run in runs.items() if not is_trained(run)])
    for group in groups:
        try:
            commands = {arm: deepspeed_command(_arm_overrides(arm, overrides)) for arm in group}
        except ConfigError as error:
            fail(str(error))
        for command in commands.values():
            _say("training: " + " ".join(["deepspeed", *command[1:]]))
        failed = _run(
            commands,
            environment=environment,
            logs={arm: FOLDER / f"{arm}.log" for arm in group},
            progress=lambda: ", ".join(f"{arm} {_progress(run)}" for arm, run in runs.items()),
        ) or next(((arm, 0) for arm in group if not is_trained(runs[arm])), None)
        if failed:
            _end_with_log(*failed)


def _end_with_log(arm: str, status: int) -> NoReturn:
    log = FOLDER / f"{arm}.log"
    error = last_error(log)
    _say(f"training {arm} ended with status {status}; see {log}")
    if error:
        print(error, file=sys.stderr)
    raise SystemExit(2 if error else 1)


def _progress(run: RunConfig) -> str:
    steps = _steps(run)
    if not steps:
        return "starting"
    last = steps[-1]
    return f"step {last['step']}/{run.total_steps} loss {_last(steps, 'loss')} {last['tokens_per_second']:,.0f} tok/s"


def _metrics(run: RunConfig) -> list[dict[str, Any]]:
    path = Path(run.run_dir) / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _steps(run: RunConfig) -> list[dict[str, Any]]:
    return [line for line in _metrics(run) if "event" not in line]


def _last(lines: list[dict[str, Any]], key: str) -> str:
    """The last of a loss; training writes none where it is not finite."""
    value = lines[-1][key] if lines else None
    return "none" if value is None else f"{value:.3f}"


def _evaluate(runs: Mapping[str, RunConfig]) -> None:
    """Both arms' weights, each under both attentions."""
    settings = json.dumps([_label(run) for run in runs.values()])
    groups, environment = _groups([arm for arm, run in runs.items() if not _is_evaluated(run)])
    for group in groups:
        _say(f"evaluating {' and '.join(group)} on held-out long documents")
        failed = _run({arm: _evaluation_command(runs[arm], settings) for arm in group}, environment=environment)
        if failed:
            _say(f"evaluating {failed[0]} ended with status {failed[1]}")
            raise SystemExit(failed[1])


def _evaluation_command(run: RunConfig, settings: str) -> list[str]:
    places = [f"checkpoint={run.run_dir}", f"data.prepared_dir={run.data.prepared_dir}"]
    documents = ["max_documents=8", "max_document_tokens=8192"]
    return [sys.executable, "-m", "scripts.evaluate", *places, f"attentions={settings}", *documents]


def _is_evaluated(run: RunConfig) -> bool:
    result, latest = Path(run.run_dir) / "evaluation" / "evaluation.json", Path(run.run_dir) / "checkpoints" / "latest"
    return result.exists() and result.stat().st_mtime > latest.stat().st_mtime


def _write_report(runs: dict[str, RunConfig], seconds: float) -> Path:
    results = {arm: json.loads((Path(run.run_dir) / "evaluation" / "evaluation.json").read_text()) for arm, run in runs.items()}
    plot_losses(FOLDER / "loss.png", {_label(run): Path(run.run_dir) / "metrics.jsonl" for run in runs.values()})
    trained = {arm: next(row for row in result["results"] if row["attention"] == _label(runs[arm])) for arm, result in results.items()}
    plot_positions(FOLDER / "position.png", {_label(runs[arm]): row["by_position"] for arm, row in trained.items()})
    path = FOLDER / "report.md"
    write_atomically(path, _report_text(runs, results, seconds))
    return path


def _label(run: RunConfig) -> str:
    layers = set(map(str, run.stages[-1].attention.per_layer(run.model.num_layers)))
    return " + ".join(sorted(layers))


def _report_text(runs: dict[str, RunConfig], results: dict[str, dict], seconds: float) -> str:
    run = runs["moba"]
    rows = []
    for arm in ARMS:
        steps = _steps(runs[arm])
        speeds = sorted(line["tokens_per_second"] for line in steps)
        heldout = [line for line in _metrics(runs[arm]) if line.get("event") == "evaluation"]
        losses = f"{_last(steps, 'loss')} | {_last(heldout, 'heldout_loss')}"
        rows.append(f"| {_label(runs[arm])} | {steps[-1]['tokens']:,} | {losses} | {speeds[len(speeds) // 2]:,.0f} |")
    documents = results["moba"]["documents"]
    return "\n".join(
        [
            "# Quickstart: the same decoder with full attention and with MoBA",
            "",
            f"{date.today().isoformat()}, {platform.system()} {platform.machine()}, {_machine()}, torch {torch.__version__}; "
            f"context {run.stages[-1].seq_len}, {run.total_steps} steps of {run.stages[-1].batch_tokens:,} tokens, seed {run.seed}. "
            f"This call took {seconds:.0f} s (what was done before is reused).",
            "",
            "| attention | tokens | last training loss | held-out loss | tokens/s (median step) |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "![training loss](loss.png)",
            "",
            f"## The {documents['scored']} longest held-out documents, {documents['scored_tokens']:,} tokens",
            "",
            *[line for arm in ARMS for line in (f"Weights trained with {_label(runs[arm])}:", "", main_table(results[arm]["results"]), "")],
            "![perplexity by position](position.png)",
            "",
            f"Details: {', '.join(f'[{arm}]({arm}/evaluation/evaluation.md)' for arm in ARMS)}",
            "",
        ]
    )


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]), interrupted="run it again to go on")
