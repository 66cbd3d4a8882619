"""Scaling laws of a sweep's results: `python -m scripts.fit results=outputs/sweeps/NAME/results.csv`.

    offset=true              fit L = e + a·C^b instead of L = a·C^b
    compute=executed         C of the FLOPs that were executed, instead of 6ND
    arms='["full","moba(512, 3)"]'          these arms, gaps to the first

A law for each arm, over all positions and by range of positions, with bootstrap intervals; the largest size foretold from the smaller ones;
the gap between arms; the paper's lines beside them where axes agree. Writes fit.md and fit.png beside the results, or into output_dir.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.registry import command
from configs.schema import FitConfig
from scripts.program import first_word_is, run
from scripts.scaling.report import markdown, plot
from scripts.scaling.study import study
from scripts.scaling.writing import write_and_show


def main() -> None:
    """Takes the results, where they are the first word, off the command line; the rest is its config."""
    first_word_is("results")
    fit_results()


@command(FitConfig, config_name="fit")
def fit_results(config: FitConfig) -> None:
    """Fits, writes and prints the report."""
    found = study(config)
    write_and_show(config, "fit", markdown(found), partial(plot, found))


if __name__ == "__main__":
    run(main, interrupted="nothing was written")
