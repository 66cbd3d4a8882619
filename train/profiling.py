"""`profile.steps`: what a few steps spend their time and memory on, in files that torch's own viewers open."""

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from configs.schema import ProfileConfig
from train.distributed import Ranks
from train.run_dir import unwritable

FOLDER = "profile"
_ALLOCATIONS = 1_000_000  # the newest are kept


class Profiler(contextlib.AbstractContextManager["Profiler"]):
    """Watches the steps of `ProfileConfig` that this launch comes through, and writes under `run_dir/profile`, each rank its own:
    `steps_10-12_rank_00000.json.gz`, a trace for chrome://tracing or perfetto.dev, and on a GPU `….pickle`, a snapshot of its memory
    for pytorch.org/memory_viz. Other steps cost nothing."""

    def __init__(self, config: ProfileConfig, run_dir: Path, ranks: Ranks) -> None:
        self._steps, self._folder, self._ranks = config.window, run_dir / FOLDER, ranks
        self._running: profile | None = None
        self._seen: list[int] = []

    def before(self, step: int) -> None:
        """To be called before each step; they are counted from 1, as in the run's figures."""
        if step not in self._steps:
            return
        self._seen.append(step)
        if not self._running:
            activities = [ProfilerActivity.CPU]
            if self._ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """To be called after each step; the trace, when the last of the steps is over. Raises ConfigError where it cannot be written."""
        return self._write() if self._running and step + 1 not in self._steps else None

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run ended among these steps
            self._write()

    def _write(self) -> Path:
        assert self._running
        running, self._running = self._running, None
        name = f"steps_{self._seen[0]}-{self._seen[-1]}_rank_{self._ranks.rank:05d}"
        trace = self._folder / f"{name}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            running.stop()
            running.export_chrome_trace(str(trace))
            if self._ranks.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except OSError as error:
            raise unwritable(f"profile.steps: {trace}", error) from None
        return trace
