"""Check a training run and say what it will cost: `python -m scripts.plan experiment=NAME key=value ...`.

    num_gpus=8 gpu=H200 mfu=0.4      what it would run on; the other keys are those of train.main
    --measure (or measure=true)      also run the layers' shapes on this machine's device

Refuses what training would refuse, and allocates nothing (unless it measures). Prints per stage: tokens, steps, attention of each
layer, FLOPs executed and as if all attention were full, time, memory of a GPU by part; and from which context length on MoBA pays.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.registry import command, show
from configs.schema import PlanConfig
from scripts.program import run
from train.calibrate import calibrate
from train.plan import make_plan
from train.plan_report import markdown


@command(PlanConfig, config_name="train")
def main(config: PlanConfig) -> None:
    """Plans, measures where asked, and prints the report."""
    plan = make_plan(config)
    show(markdown(plan, calibrate(plan) if config.measure else None))


def program() -> None:
    """The command line, in which the flag `--measure` is the setting `measure=true`."""
    sys.argv[1:] = ["measure=true" if text == "--measure" else text for text in sys.argv[1:]]
    main()


if __name__ == "__main__":
    run(program, interrupted="nothing was written")
