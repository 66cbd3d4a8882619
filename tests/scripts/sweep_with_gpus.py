"""`scripts.sweep` in a process of its own that believes it has FAKE_GPUS GPUs, and finds the CLI in the folder FAKE_CLI."""

import os

from scripts import launching, sweep
from scripts.program import run
from scripts.sweeps import table, task


def believe() -> None:
    gpus = int(os.environ["FAKE_GPUS"])
    launching._path = lambda: f"{os.environ['FAKE_CLI']}{os.pathsep}{os.environ['PATH']}"
    task._on_gpu = lambda job: gpus > 0
    task.visible_gpus = lambda: [str(index) for index in range(gpus)]
    task._device = lambda job: "none"
    table._EVERY_SECONDS = 0.05


class Task(task.Task):
    """In a launcher's process too."""

    def __call__(self, values: list[str]) -> float:
        believe()
        return super().__call__(values)


def main() -> None:
    believe()
    sweep.Task = Task
    run(sweep.main, interrupted="run it again to go on")


if __name__ == "__main__":
    from tests.scripts import sweep_with_gpus  # where launchers' processes find Task

    sweep_with_gpus.main()
