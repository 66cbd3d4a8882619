"""One page on a run, or on the runs of a sweep: `python -m scripts.report FOLDER`.

    output=PATH                      report.html in the folder otherwise

The page has the settings, the curves of metrics.jsonl, what MoBA's gates chose, and what other commands have left in the folder, such as
evaluations and fits, with their tables and figures. It is one file, which needs no network and no script.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.registry import command, show
from configs.schema import ConfigError, ReportConfig
from scripts.program import first_word_is, run
from scripts.reporting.page import Page, render
from scripts.reporting.runs import is_run, run_page
from scripts.reporting.sweeps import is_sweep, sweep_page
from train.run_dir import unwritable, write_atomically

FILE = "report.html"


def main() -> None:
    """Takes the folder, the first word, off the command line; the rest is its config."""
    first_word_is("folder")
    report()


@command(ReportConfig, config_name="report")
def report(config: ReportConfig) -> None:
    """Writes the page and prints where it is."""
    folder = Path(config.folder)
    target = Path(config.output) if config.output else folder / FILE
    try:
        page = make_page(folder)
    except OSError as error:
        raise ConfigError(f"folder={folder}: {error.filename} cannot be read ({error.strerror})") from None
    try:
        write_atomically(target, render(page))
    except OSError as error:
        raise unwritable(f"output={target}", error) from None
    show(str(target))


def make_page(folder: Path) -> Page:
    """What there is to say of a folder. Raises ConfigError where it holds no run."""
    if not folder.is_dir():
        raise ConfigError(f"folder={folder}: no such folder")
    if is_run(folder):
        return run_page(folder)
    if is_sweep(folder):
        return sweep_page(folder)
    raise ConfigError(f"folder={folder}: holds neither the metrics.jsonl of a run, nor results.csv of a sweep, nor folders of runs")


if __name__ == "__main__":
    run(main, interrupted="the page was not written")
