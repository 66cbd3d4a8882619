"""Times, memory and kernels of one row of the benchmark, on whatever device a meter stands for."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from configs.schema import AttentionKernel
from scripts.attention_benchmark.cases import Attention, Case, draw_inputs, kernel_of
from scripts.attention_benchmark.check import Check, check

Call = Callable[[], object]

FORWARD, BOTH = "forward", "forward+backward"
# Calls before the first timed one: compilation, then caches.
_WARM_UP = 2
# A measurement takes no more calls than fit in this time, in ms, but at least so many.
_LONG, _LEAST = 10_000, 3
# Calls under the profiler, for the time of each kernel.
_PROFILED = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of equal calls, in ms."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took longer."""
        return statistics.median(self.samples)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one row; times by pass, `FORWARD` and, where measured, `BOTH`."""

    row: AttentionKernel
    case: Case
    problem: str = ""
    """Why there are no times; empty where there are."""
    check: Check | None = None
    """Where the kernel ran on the reduced case."""
    eager: dict[str, Timing] = field(default_factory=dict)
    """Calls as a program makes them, each waited for."""
    graph: dict[str, Timing] = field(default_factory=dict)
    """Replays of a CUDA graph of the call."""
    no_graph: str = ""
    """Why the call could not be captured."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes allocated at most beyond q, k, v and the output's gradient."""
    kernels: dict[str, float] = field(default_factory=dict)
    """ms of one call of the last pass, by kernel name; of the triton row."""

    @property
    def is_wrong(self) -> bool:
        """The kernel gave a result, and it failed its check."""
        return self.check is not None and bool(self.check.problem)


class CudaMeter:
    """Measures calls on the current CUDA device."""

    device = torch.device("cuda")

    def time(self, call: Call) -> float:
        """ms between two events around the call, on an idle device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, call: Call) -> int:
        """Bytes allocated at most during the call beyond those before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, call: Call) -> Call:
        """The replay of a CUDA graph of the call. Raises RuntimeError where the call does what a graph cannot hold."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()  # libraries set up their handles for this stream now, not during the capture
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            call()
        return graph.replay

    def kernels(self, call: Call) -> dict[str, float]:
        """ms of one call on the device, by kernel name: the mean of a few calls."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(_PROFILED):
                call()
            torch.cuda.synchronize()
        on_device = (event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
        return {event.key: event.self_device_time_total / 1e3 / _PROFILED for event in on_device}

    def clear(self) -> None:
        """Gives unused memory back, so that a row starts as the first did."""
        gc.collect()
        torch.cuda.empty_cache()


def measure(row: AttentionKernel, case: Case, meter: CudaMeter) -> Result:
    """Checks the row's result on a reduced case, then measures the row. What goes wrong is the result's `problem`."""
    meter.clear()
    checked = None
    try:
        reduced = case.reduced()
        checked = check(row, kernel_of(row, reduced, meter.device), reduced, meter.device)
        if checked.problem:
            return Result(row=row, case=case, check=checked, problem=f"wrong: {checked.problem}")
        return _measure(row, case, checked, meter)
    except torch.cuda.OutOfMemoryError:
        problem = "out of memory"
    except ValueError as error:
        problem = f"refused: {_first_line(error)}"
    except Exception as error:  # of any package's kernel: the other rows are still wanted
        problem = f"failed: {type(error).__name__}: {_first_line(error)}"
    return Result(row=row, case=case, check=checked, problem=problem)


def _measure(row: AttentionKernel, case: Case, checked: Check | None, meter: CudaMeter) -> Result:
    calls, repeats = _passes(kernel_of(row, case, meter.device), case, meter.device), case.config.repeats
    eager = {name: _time(call, repeats, meter) for name, call in calls.items()}
    peak = {name: meter.peak(call) for name, call in calls.items()}
    kernels = meter.kernels(calls[list(calls)[-1]]) if row is AttentionKernel.TRITON else {}
    graph, no_graph = {}, ""
    try:  # last: a capture that fails can leave allocations behind
        for name, call in calls.items():
            graph[name] = _time(meter.capture(call), repeats, meter)
    except torch.cuda.OutOfMemoryError:
        no_graph = "out of memory"
    except Exception as error:  # whatever a kernel's library makes of it, the times above stand
        no_graph = _first_line(error)
    return Result(row=row, case=case, check=checked, eager=eager, graph=graph, no_graph=no_graph, peak=peak, kernels=kernels)


def _passes(attention: Attention, case: Case, device: torch.device) -> dict[str, Call]:
    q, k, v, d_out = draw_inputs(case, device)

    @torch.no_grad()
    def forward() -> object:
        return attention(q, k, v)

    def both() -> object:
        return torch.autograd.grad(attention(q, k, v), (q, k, v), d_out)

    return {FORWARD: forward, BOTH: both} if case.config.backward else {FORWARD: forward}


def _time(call: Call, repeats: int, meter: CudaMeter) -> Timing:
    for _ in range(_WARM_UP):
        last = meter.time(call)
    count = min(repeats, max(_LEAST, int(_LONG / last)))
    return Timing(samples=tuple(meter.time(call) for _ in range(count)))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
