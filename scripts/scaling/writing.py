"""Where the reports on a sweep's results go."""

from collections.abc import Callable
from pathlib import Path

from configs.registry import show
from configs.schema import CompareConfig, FitConfig
from train.run_dir import unwritable, write_atomically


def write_and_show(config: FitConfig | CompareConfig, name: str, text: str, plot: Callable[[Path], None]) -> None:
    """NAME.md with `text` and NAME.png of `plot`, in `output_dir` or beside the results; prints the text and where both are.

    Raises ConfigError where the folder cannot be written."""
    folder = Path(config.output_dir) if config.output_dir else Path(config.results).parent
    report, figure = folder / f"{name}.md", folder / f"{name}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot(figure)
        write_atomically(report, text)
    except OSError as error:
        raise unwritable(f"output_dir={folder}", error) from None
    show("\n".join([text, str(report), str(figure)]))
