"""The training program.

deepspeed --module --no_local_rank train.main experiment=NAME key=value ...     on 1..n GPUs (or gloo ranks)
python -m train.main experiment=NAME key=value ...                              one process
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.checks import check_run
from configs.registry import command
from configs.schema import RunConfig
from train.distributed import find_ranks, run_to_end
from train.engine import processes
from train.loop import train


@command(RunConfig, config_name="train")
def main(run: RunConfig) -> None:
    """Checks the run, joins the other ranks, trains."""
    ranks = find_ranks(run.device)
    check_run(run, world_size=ranks.world_size)
    with processes(ranks):
        train(run, ranks)


if __name__ == "__main__":
    run_to_end(main)
