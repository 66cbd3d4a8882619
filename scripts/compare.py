"""What one arm of a sweep costs over another at one size: `python -m scripts.compare results=outputs/sweeps/NAME/results.csv`.

    arms='["full","moba(512, 3)"]'          these arms, gaps to the first

For runs that differ in nothing but arm and seed: losses, and the gap to the first arm with a 95 % interval by paired bootstrap over
held-out documents (over rows, where runs have not kept whose they are), over all positions and by range. Writes compare.md and compare.png
beside the results, or into output_dir. Laws over several sizes: python -m scripts.fit.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.registry import command
from configs.schema import CompareConfig
from scripts.program import first_word_is, run
from scripts.scaling.comparison import compare
from scripts.scaling.comparison_report import markdown, plot
from scripts.scaling.writing import write_and_show


def main() -> None:
    """Takes the results, where they are the first word, off the command line; the rest is its config."""
    first_word_is("results")
    compare_arms()


@command(CompareConfig, config_name="compare")
def compare_arms(config: CompareConfig) -> None:
    """Compares, writes and prints the report."""
    found = compare(config)
    write_and_show(config, "compare", markdown(found), partial(plot, found))


if __name__ == "__main__":
    run(main, interrupted="nothing was written")
