"""Several trainings in one launch, because importing torch and deepspeed costs more than a tiny run: driver JOBS.json.

A job is {"overrides": [...]}; for streamed sources perhaps "group": tokens of a group. It may be killed, which ends every rank's process
by SIGKILL on rank 0: with "kill_in_step": n after the backward pass of that step and before its optimizer step; with "kill_in_writing": n
when the files of the checkpoint of step n are written, and it is not yet whole.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import data.streaming
from configs.checks import check_run
from configs.registry import compose
from configs.schema import Device, RunConfig
from train import saving
from train.distributed import find_ranks, run_to_end
from train.engine import Engine, processes
from train.loop import train


def _kill_in_step(number: int, is_main: bool) -> None:
    plain = Engine.step
    seen = 0

    def step(self, lr):
        nonlocal seen
        seen += 1
        if seen == number and is_main:
            for thread in threading.enumerate():  # the checkpoint before is whole by then, however quick the steps are
                if thread.name == "checkpoint":
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, lr)

    Engine.step = step


def _kill_in_writing(step: int) -> None:
    def publish(root, beside, target, *_):
        if target.name == f"step_{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(root, beside, target, *_)

    plain, saving._publish = saving._publish, publish


def main() -> None:
    ranks = find_ranks(Device.AUTO)  # tests that want no GPU show it none
    with processes(ranks):
        for job in json.loads(Path(sys.argv[1]).read_text()):
            if job.get("kill_in_step"):
                _kill_in_step(job["kill_in_step"], ranks.is_main)
            if job.get("kill_in_writing"):
                _kill_in_writing(job["kill_in_writing"])
            data.streaming.SHUFFLE_TOKENS = job.get("group", data.streaming.SHUFFLE_TOKENS)
            run = compose(RunConfig, config_name="train", overrides=job["overrides"])
            check_run(run, world_size=ranks.world_size)
            train(run, ranks)


if __name__ == "__main__":
    run_to_end(main)
