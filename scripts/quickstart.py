"""The whole road on real text: prepare, train full attention and MoBA, evaluate, report. `bash scripts/quickstart.sh` calls it.

Every step is a command of its own that knows what is done already, so running this again goes on where it stopped. Arguments
are overrides of both training runs.
"""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from configs.registry import REPOSITORY, compose, fail
from configs.schema import ConfigError, RunConfig
from scripts.figures import plot_losses, plot_positions
from train.report import main_table
from train.run_dir import write_atomically

FOLDER = Path("outputs/quickstart")
ARMS = {"full": "attention.rule=full", "moba": "attention.rule=moba"}
_EVERY_SECONDS = 15  # between two lines of progress


def main(overrides: list[str]) -> None:
    """Runs what is not done yet and prints where the report is."""
    os.chdir(REPOSITORY)
    try:
        runs = {arm: compose(RunConfig, config_name="train", overrides=_arm_overrides(arm, overrides)) for arm in ARMS}
    except ConfigError as error:
        fail(str(error))
    started = time.perf_counter()
    _say("preparing the corpus")
    _run([sys.executable, "-m", "scripts.prepare_data", "data=bundled"])
    _train(runs, overrides)
    _evaluate(runs)
    report = _write_report(runs, time.perf_counter() - started)
    _say(f"done in {time.perf_counter() - started:.0f} s")
    print("\n".join(str(path) for path in (report, FOLDER / "loss.png", FOLDER / "position.png")))


def _arm_overrides(arm: str, overrides: list[str]) -> list[str]:
    return ["experiment=quickstart", ARMS[arm], f"name=quickstart_{arm}", f"run_dir={FOLDER / arm}", *overrides]


def _say(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def _train(runs: dict[str, RunConfig], overrides: list[str]) -> None:
    """Both arms through the deepspeed CLI: on a GPU one after the other, on CPUs side by side with half the cores each."""
    waiting = {arm: run for arm, run in runs.items() if not _is_trained(run)}
    if torch.cuda.is_available():
        for arm, run in waiting.items():
            _wait({arm: _launch(arm, overrides, environment={})}, {arm: run})
    else:
        _wait({arm: _launch(arm, overrides, _share_of_cores()) for arm in waiting}, waiting)


def _is_trained(run: RunConfig) -> bool:
    return (Path(run.run_dir) / "checkpoints" / f"step_{run.total_steps:08d}").is_dir()


def _launch(arm: str, overrides: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the launcher starts `python`, which must be this one
    deepspeed = shutil.which("deepspeed", path=path)
    if deepspeed is None:
        fail("deepspeed: no such command beside this Python or on PATH; bash scripts/setup.sh installs it")
    command = [deepspeed, "--module", "--no_local_rank", "--num_gpus", "1", "--master_port", str(port), "train.main"]
    command += [*_arm_overrides(arm, overrides), "logging.progress=false"]
    _say("training: " + " ".join(["deepspeed", *command[1:]]))
    log = FOLDER / f"{arm}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, env=os.environ | environment | {"PATH": path}, stdout=file, stderr=file, start_new_session=True)


def _wait(launches: dict[str, subprocess.Popen[bytes]], runs: dict[str, RunConfig]) -> None:
    """Follows the launches to their end; when interrupted, passes the signal on, so that they save before this process ends."""
    previous = {number: signal.signal(number, _interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(process.poll() is None for process in launches.values()):
            _sleep(launches)
            _say(", ".join(f"{arm} {_progress(runs[arm])}" for arm in launches))
    except KeyboardInterrupt:
        for process in launches.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in launches.values():
            process.wait()
        raise SystemExit("quickstart: interrupted; run it again to go on") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for arm, process in launches.items():
        if process.returncode != 0 or not _is_trained(runs[arm]):
            raise SystemExit(f"quickstart: training {arm} ended with status {process.returncode}; see {FOLDER / arm}.log")


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _sleep(launches: dict[str, subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _EVERY_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in launches.values()):
        time.sleep(0.2)


def _progress(run: RunConfig) -> str:
    steps = [line for line in _metrics(run) if "event" not in line]
    if not steps:
        return "starting"
    last = steps[-1]
    return f"step {last['step']}/{run.total_steps} loss {last['loss']:.3f} {last['tokens_per_second']:,.0f} tok/s"


def _metrics(run: RunConfig) -> list[dict]:
    path = Path(run.run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _evaluate(runs: dict[str, RunConfig]) -> None:
    """Both arms' weights, each under both attentions; on CPUs side by side."""
    waiting = {arm: run for arm, run in runs.items() if not _is_evaluated(run)}
    settings = json.dumps([_label(run) for run in runs.values()])
    commands = {
        arm: [sys.executable, "-m", "scripts.evaluate", f"checkpoint={run.run_dir}", f"data.prepared_dir={run.data.prepared_dir}",
              f"contexts=[{run.stages[-1].seq_len}]", f"attentions={settings}", "max_documents=8", "max_document_tokens=8192"]
        for arm, run in waiting.items()
    }  # fmt: skip
    if waiting:
        _say(f"evaluating {' and '.join(waiting)} on held-out long documents")
    if torch.cuda.is_available():
        for command in commands.values():
            _run(command)
    else:
        processes = [subprocess.Popen(command, env=os.environ | _share_of_cores()) for command in commands.values()]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit("quickstart: evaluation failed")


def _is_evaluated(run: RunConfig) -> bool:
    result, latest = Path(run.run_dir) / "evaluation" / "evaluation.json", Path(run.run_dir) / "checkpoints" / "latest"
    return result.exists() and result.stat().st_mtime > latest.stat().st_mtime


def _share_of_cores() -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // len(ARMS)))}


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
        steps = [line for line in _metrics(runs[arm]) if "event" not in line]
        speeds = sorted(line["tokens_per_second"] for line in steps)
        heldout = [line["heldout_loss"] for line in _metrics(runs[arm]) if line.get("event") == "evaluation"]
        losses = f"{steps[-1]['loss']:.3f} | {heldout[-1]:.3f}"
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
    main(sys.argv[1:])
