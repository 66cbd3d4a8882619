"""The steps of one case, in a process (or ranks) of its own: `python -m scripts.training_benchmark.steps FOLDER`.

FOLDER holds the case; it gets `metrics.jsonl`, a line for each step as in training and, when all are done, an event `end` with what
this process took of the machine.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from configs.mapping import from_mapping
from configs.registry import fail
from configs.schema import ConfigError, TrainBenchmarkConfig, TrainingRow
from data.shards import Corpus
from model.host_memory import page_locked
from scripts.training_benchmark.communication import TRACE, communication, read_trace, shares, traced
from scripts.training_benchmark.peer import transformers_steps
from train.distributed import find_ranks, gather_objects, run_to_end
from train.engine import Engine, processes
from train.loop import new_model
from train.metrics import Metrics
from train.trainer import Trainer

CASE_FILE = "case.json"
"""`row` and `run`, as `configs.mapping` writes them."""


def main() -> None:
    """Measures the case in the folder that the command line names."""
    folder = Path(sys.argv[1])
    values = json.loads((folder / CASE_FILE).read_text())
    try:
        STEPS[TrainingRow(values["row"])](from_mapping(TrainBenchmarkConfig, values["run"]), folder)
    except ConfigError as error:
        fail(str(error))


def framework_steps(run: TrainBenchmarkConfig, folder: Path) -> None:
    """All steps of the run by the trainer itself, from random weights that are drawn where they will lie."""
    ranks = find_ranks(run.device)
    with processes(ranks):
        corpus = Corpus.open(run.data.prepared_dir)
        with torch.device(ranks.device):
            model = new_model(run)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=run.model.init_std)
        engine = Engine(model, parallel=run.parallel, optim=run.optim, ranks=ranks)
        trainer = Trainer(run, ranks, corpus, engine, None)
        with Metrics(run, folder, first_step=0, is_main=ranks.is_main) as metrics:
            counted = run.warmup_steps + run.steps
            while trainer.done < counted:
                trainer.step(metrics)
            spent = trace_rest(trainer, metrics, folder) if counted < run.total_steps else {}
            metrics.event("end", trainer.done, program="", **machine(ranks.device), **spent)


def trace_rest(trainer: Trainer, metrics: Metrics, folder: Path) -> dict[str, float | str | None]:
    """Takes the run's last steps under the profiler, whose traces stay in `folder`; returns the shares of communication."""
    path = folder / TRACE.format(rank=trainer.ranks.rank)
    with traced(path, trainer.ranks.device):
        started = time.perf_counter()
        while trainer.done < trainer.run.total_steps:
            trainer.step(metrics)
        seconds = time.perf_counter() - started
    found, times = zip(*gather_objects((communication(read_trace(path)), seconds)), strict=True)
    return shares(found, times)


def peer_steps(run: TrainBenchmarkConfig, folder: Path) -> None:
    """The same by `transformers`."""
    with Metrics(run, folder, first_step=0, is_main=True) as metrics:
        program, device = transformers_steps(run, metrics)
        metrics.event("end", run.total_steps, program=program, **machine(device))


def machine(device: torch.device) -> dict[str, str | float | None]:
    """The device, and GiB of this machine's memory that the process held at most: resident, and pinned for the GPU, by torch
    and by `model.host_memory`: the most of the one and the most of the other."""
    # getrusage would count the memory of the process that started this one too.
    resident = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert resident
    pinned = None
    if device.type == "cuda":
        pinned = (torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) + page_locked.peak) / 2**30
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "host_gib": int(resident[1]) / 2**20,
        "pinned_gib": pinned,
    }


STEPS: Mapping[TrainingRow, Callable[[TrainBenchmarkConfig, Path], None]] = {
    TrainingRow.FRAMEWORK: framework_steps,
    TrainingRow.TRANSFORMERS: peer_steps,
}

if __name__ == "__main__":
    run_to_end(main)
