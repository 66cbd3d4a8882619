"""What a checkpoint makes of held-out documents: `python -m scripts.evaluate checkpoint=RUN_OR_CHECKPOINT data.prepared_dir=CORPUS`.

    suite=perplexity|long|benchmarks             what is found out: loss, all about long contexts, standard benchmarks
    contexts=[512,2048]                          context lengths, in tokens
    attentions='["full","moba(64, 4)"]'          attention rules to try on the same weights
    rope.scaling=yarn rope.factor=4              positions for contexts beyond the checkpoint's

Without these, perplexity under what the checkpoint was trained with last. Writes evaluation.json, evaluation.md and figures into
output_dir (default: `evaluation` in the run folder). Several ranks, `deepspeed --module --no_local_rank scripts.evaluate ...`, share
every document; they take perplexity alone. docs/evaluation.md says how each part is made and what its figures mean.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from configs.checks import divisors
from configs.mapping import to_mapping
from configs.registry import command, show
from configs.schema import ConfigError, EvaluateConfig, EvaluationPart, RunConfig
from model.transformer import Transformer
from scripts.figures import plot_gates, plot_needles, plot_positions
from scripts.program import run
from train.checkpoint import resolve
from train.distributed import Ranks, choose_device, find_ranks, on_main, run_to_end, share_rows
from train.engine import processes
from train.evaluate import attention_label, attention_settings, choose_documents, context_lengths, open_corpus, stretch
from train.initial import is_converted, load_into, state_of, tokenizers_of
from train.kernels import compute_dtype
from train.report import describe_documents, markdown, overview, result_label
from train.run_dir import describe_launch, write_atomically
from train.suite import Suite

Plot = Callable[[Path], None]


@command(EvaluateConfig, config_name="evaluate")
def main(config: EvaluateConfig) -> None:
    """Evaluates, and prints the main table and where the files are."""
    ranks = find_ranks(config.device)
    with processes(ranks) if ranks.world_size > 1 else nullcontext():
        report = evaluate(config, ranks)
    if ranks.is_main:
        files = [*(name for name, plot in _figures(report).items() if plot), "evaluation.md", "evaluation.json"]
        show("\n".join([overview(report), *(str(Path(report["output_dir"]) / name) for name in files)]))


def evaluate(config: EvaluateConfig, ranks: Ranks | None = None) -> dict[str, Any]:
    """What evaluation.json holds, after it, the Markdown and the figure are written. Raises ConfigError before the long work.

    All of `ranks` call it and share each document (None: this process is alone).
    """
    ranks = ranks or Ranks(rank=0, world_size=1, device=choose_device(config.device))
    device = ranks.device
    checkpoint = on_main(ranks, lambda: find_checkpoint(config.checkpoint))
    state = state_of(checkpoint)
    trained = state.run()
    stage = stretch(state.stage(), trained, config.rope)
    if ranks.world_size > 1:
        _check_sharing(config, trained, ranks)
    settings = attention_settings(config, trained, stage)
    contexts = context_lengths(config, trained, stage, settings)
    corpus = open_corpus(config.data, tokenizers_of(checkpoint))
    documents = choose_documents(corpus, config)
    suite = Suite.prepare(config, corpus, settings, contexts, documents)
    folder = on_main(ranks, lambda: _make_folder(config, checkpoint))

    attention, workspace = next(iter(settings.values())), stage.attention.workspace
    tile = trained.parallel.ffn_tile
    model = Transformer(trained.model, attention, stage.rope, config.backend.value, workspace, ffn_tile=tile)
    load_into(model, checkpoint)
    model.to(device, compute_dtype(config.precision)).eval()
    share_rows(model, ranks.world_size)
    with _progress(suite.total_tokens, shown=ranks.is_main) as progress:
        found = suite.run(model, corpus, config.checkpoint, device, progress)
    report = {
        "run": trained.name,
        "checkpoint": str(checkpoint),
        "step": state.step,
        "trained_context": stage.seq_len,
        "trained_attention": attention_label(stage.attention.rule, stage.attention.per_layer(trained.model.num_layers)),
        "corpus": config.data.prepared_dir,
        "tokenizer_hash": corpus.tokenizer_hash,
        "documents": describe_documents(documents, corpus.split("heldout").num_documents),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **found,
        "not_measured": list(suite.not_measured),
        "output_dir": str(folder),
        "config": to_mapping(config),
        "launch": describe_launch(ranks.world_size),
        "training": {"git": state.git, "config": state.config},
    }
    on_main(ranks, lambda: _write(folder, report))
    return report


def find_checkpoint(path: str) -> Path:
    """The whole checkpoint or converted folder that the key `checkpoint` names; damaged ones on the way are said. Raises ConfigError."""
    if is_converted(Path(path)):
        return Path(path)
    try:
        return resolve(path, lambda text: print(text, file=sys.stderr))
    except ConfigError as error:
        raise ConfigError(f"checkpoint={error}") from None


def _check_sharing(config: EvaluateConfig, trained: RunConfig, ranks: Ranks) -> None:
    """Raises ConfigError for what ranks that share documents cannot do."""
    alone = [part.value for part in config.suite.parts if part is not EvaluationPart.PERPLEXITY]
    if alone:
        raise ConfigError(
            f"suite.parts={','.join(alone)}: runs in one process; the {ranks.world_size} ranks of this launch share documents for "
            "perplexity alone"
        )
    num_heads = trained.model.num_heads
    if num_heads % ranks.world_size:
        raise ConfigError(
            f"checkpoint={config.checkpoint}: its model has {num_heads} query heads, which the {ranks.world_size} ranks of this launch do "
            f"not divide; accepted: {divisors(num_heads)}"
        )


def _make_folder(config: EvaluateConfig, checkpoint: Path) -> Path:
    if not config.output_dir and checkpoint.parent.name != "checkpoints":
        raise ConfigError(f"output_dir='': must be given, {checkpoint} lies in no run folder")
    folder = Path(config.output_dir) if config.output_dir else checkpoint.parent.parent / "evaluation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"output_dir={folder}: is a file; choose a folder") from None
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be made ({error.strerror})") from None
    return folder


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar of scored tokens on a terminal's stderr, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, tokens: bar.update(task, advance=tokens, description=text)


def _figures(report: dict[str, Any]) -> dict[str, Plot | None]:
    """What draws each figure, by file name; None where the report has no values for it."""
    needles = [row for row in report["retrieval"] if row["depth"] is not None]
    with_choices = [row for row in report["gates"] if row["heads"]]
    gates = [row for row in with_choices if row["context"] == max(each["context"] for each in with_choices)]
    lines = {result_label(result): result["by_position"] for result in report["results"]}
    drawn: dict[str, tuple[Any, Plot]] = {
        "position.png": (lines, lambda path: plot_positions(path, lines)),
        "needle.png": (needles, lambda path: plot_needles(path, needles)),
        "gates.png": (gates, lambda path: plot_gates(path, gates)),
    }
    return {name: plot if values else None for name, (values, plot) in drawn.items()}


def _write(folder: Path, report: dict[str, Any]) -> None:
    """Each file whole or not at all; evaluation.json comes last, so where it is the others are. Figures of an earlier evaluation go."""
    figures = _figures(report)
    try:
        for name, plot in figures.items():
            if plot:
                plot(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        write_atomically(folder / "evaluation.md", markdown(report))
        write_atomically(folder / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    except BaseException as error:
        for name in (*figures, "evaluation.md", "evaluation.json"):
            (folder / f".{name}.partial").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"output_dir={folder}: the report could not be written ({error.strerror})") from None
        raise


if __name__ == "__main__":
    run_to_end(partial(run, main, interrupted="nothing was written"))
