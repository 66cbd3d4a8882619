"""How much of a step ranks spend on each other, from a trace of torch's profiler."""

import contextlib
import gzip
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TRACE = "trace_rank_{rank:05d}.json.gz"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Seconds of a rank's traced steps in which something of a kind ran; what ran at once counts once."""

    total: float
    """Collectives: NCCL's kernels on a GPU, gloo's work on a CPU. Waiting for a rank that comes later is in it."""
    exposed: float | None
    """Collectives and nothing else on the device; None where it is a CPU, whose other work no trace has whole."""


@contextlib.contextmanager
def traced(path: Path, device: torch.device) -> Iterator[None]:
    """Writes a trace of the block to `path`: on a GPU of what it runs alone, which costs the steps next to nothing."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as running:
        yield
    running.export_chrome_trace(str(path))


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def communication(events: Iterable[Mapping[str, Any]]) -> Communication | None:
    """What the events of one rank's trace come to; None where there is no collective among them."""
    collectives: list[Interval] = []
    others: list[Interval] = []
    on_gpu = False
    for event in events:
        if event.get("ph") != "X":
            continue
        span, name = (event["ts"], event["ts"] + event["dur"]), event["name"]
        if event.get("cat") in _ON_GPU:
            on_gpu = True
            (collectives if "nccl" in name.lower() else others).append(span)
        elif name.startswith("gloo:"):
            collectives.append(span)
    if not collectives:
        return None
    total = covered(collectives)
    # Time with a collective or another kernel, less that with another kernel.
    exposed = (covered([*collectives, *others]) - covered(others)) / 1e6 if on_gpu else None
    return Communication(total=total / 1e6, exposed=exposed)


def shares(found: Sequence[Communication | None], seconds: Sequence[float]) -> dict[str, float | str | None]:
    """The mean over ranks of what each found in the `seconds` of its traced steps, as shares of them: `communication` and
    `communication_exposed`. None where a rank could not tell, with the reason as `communication_problem`."""
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return {"communication": None, "communication_exposed": None, "communication_problem": "the trace shows no collectives"}
    exposed = [each.exposed / time for each, time in zip(known, seconds, strict=True) if each.exposed is not None]
    return {
        "communication": statistics.fmean(each.total / time for each, time in zip(known, seconds, strict=True)),
        "communication_exposed": statistics.fmean(exposed) if exposed else None,
        "communication_problem": None if exposed else "what is exposed is known on GPUs alone",
    }


def covered(intervals: Sequence[Interval]) -> float:
    """Length of the union of (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
