"""Measure kernels, `python -m scripts.benchmark attention` and `layers`, training, `... train`, whether its layouts
agree, `... equality`, or the data pipeline, `... data`.

Attention:
    lengths=[8192,32768] settings=[[128,8],[512,3]]   tokens in a call; MoBA settings, each [block_size, topk]
    inputs=[random,skewed] documents=[one,mixed]      choices as trained models make them; several documents
    inputs=[random,trained] checkpoint=RUN            q, k and v of a trained model
    rows=[triton,cudnn] backward=false                which kernels; forward alone

Forward and forward+backward time, eager and under a CUDA graph, peak memory and sparse efficiency of MoBA and dense attention on one
GPU. A row is first checked against fp64; one that is wrong shows its error in place of a time, and the exit status is 1.
Prints Markdown; writes attention.csv and attention.png into output_dir, anew after every row.

Layers:
    model=llama_1b9 lengths=[8192,32768]              shapes; tokens in a call
    parts=[norm,rope,swiglu,ffn,loss]                 what is measured; all of it by default

Time and memory of forward+backward of what a layer has beside attention, and of the loss: eager, compiled, in tiles, and Liger's where
it is installed. Prints Markdown; writes layers.csv into output_dir.

Train:
    lengths=[8192,131072] attentions=["full","moba(512, 3)"]   tokens in a row; attention rules
    model=llama_1b9 parallel.precision=bf16                    all keys and groups of a training run: its shapes, its memory policy
    changes=[{from_length: 1048576, settings: ["steps=1"]}]    settings of long cases
    rows=[framework,transformers] dense_up_to=8192             which programs; the longest full attention
    comparison=NAME                                            one of configs/comparison/

Tokens/s, MFU, peak memory, recompilations and data wait of training steps, each case in processes of its own; one that runs out of
memory is said to. Prints Markdown; writes train.md, train.csv and train.png into output_dir, anew after every case.

Equality:
    settings=["model=llama_1b9","data=bundled"]                what is trained, as train.main is told it
    layouts=[{num_ranks: 1},{num_ranks: 2, zero_stage: 3},{num_ranks: 2, sequence_parallel: 2}]
    elastic=[{num_ranks: 2},{num_ranks: 1},{num_ranks: 2}]     launches of one more run, of which all but the last are killed

Losses and gradient norms of 20 steps under each layout beside the first's and beside what rounding alone does; whether they read the same
rows. Prints Markdown; writes equality.md and equality.csv into output_dir; the exit status is 1 where a training fails or reads other rows.

Data:
    rows=[preparing,opening,packing,loading]          what is measured; all of it by default
    text_bytes=60e6 documents=1e7 num_workers=0       how much text is prepared, documents of the corpus that is opened; processes

Rates on this machine's cores, each beside what it should reach. Prints Markdown; writes data.csv into output_dir.
"""

import datetime
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.mapping import nearest
from configs.registry import command, fail, show
from configs.schema import (
    BenchmarkConfig,
    ConfigError,
    DataBenchmarkConfig,
    EqualityBenchmarkConfig,
    KernelInputs,
    LayerBenchmarkConfig,
    ModelConfig,
    TrainBenchmarkConfig,
)
from data.workers import resolve_workers
from scripts.attention_benchmark.cases import all_cases, is_installed, label
from scripts.attention_benchmark.measure import CudaMeter, Result, measure
from scripts.attention_benchmark.report import markdown, series, to_csv
from scripts.attention_benchmark.trained import Trained
from scripts.data_benchmark import report as data_report
from scripts.data_benchmark.rows import MEASURES
from scripts.figures import plot_over_lengths
from scripts.layer_benchmark.rows import measure as measure_layers
from scripts.program import run
from scripts.training_benchmark import equality as layouts
from scripts.training_benchmark import report as training_report
from scripts.training_benchmark.cases import all_cases as all_training_cases
from scripts.training_benchmark.program import train_benchmark
from train.distributed import choose_device
from train.run_dir import write_atomically

FILES = ("attention.csv", "attention.png")
DATA_FILE, LAYERS_FILE = "data.csv", "layers.csv"


def main() -> None:
    """Takes the subcommand, the first word, off the command line; the rest is its config."""
    word = next(iter(sys.argv[1:]), "")
    if word in COMMANDS:
        sys.argv.pop(1)
    elif word not in ("-h", "--help"):
        given = "what to measure must be given" if not word or "=" in word else f"{word}: no such benchmark{nearest(word, list(COMMANDS))}"
        fail(f"{given}; accepted first word: {', '.join(COMMANDS)}")
    COMMANDS.get(word, attention)()


@command(DataBenchmarkConfig, config_name="benchmark_data")
def data(config: DataBenchmarkConfig) -> None:
    """Measures row after row and prints the report; each row's scratch folder goes as it ends."""
    folder, scratch = _make_folder(config.output_dir, "output_dir"), _make_folder(config.scratch_dir, "scratch_dir")
    facts = {"cores": str(resolve_workers(0)), "python": platform.python_version(), **_date_and_command("data")}
    figures: list[data_report.Measured] = []
    for row in config.rows:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{row.value}-") as place:
            figures += MEASURES[row](config, Path(place))
        write_atomically(folder / DATA_FILE, data_report.to_csv(figures, facts))
    show(f"{data_report.markdown(figures, facts)}\n\n{folder / DATA_FILE}")


@command(TrainBenchmarkConfig, config_name="benchmark_train")
def train(config: TrainBenchmarkConfig) -> None:
    """Measures case after case, keeps the files up to date, and prints the report."""
    cases = all_training_cases(config)
    folder, facts = _make_folder(config.output_dir, "output_dir"), {"torch": torch.__version__, **_date_and_command("train")}
    results = train_benchmark(cases, folder, facts)
    show("\n\n".join([training_report.markdown(results, facts), "\n".join(str(folder / name) for name in training_report.FILES)]))
    if any(result.has_failed for result in results):
        raise SystemExit(1)


@command(EqualityBenchmarkConfig, config_name="benchmark_equality")
def equality(config: EqualityBenchmarkConfig) -> None:
    """Trains under layout after layout, keeps the files up to date, and prints the report."""
    trainings = layouts.all_trainings(config)
    folder = _make_folder(config.output_dir, "output_dir")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"torch": torch.__version__, "device": device, **_date_and_command("equality")}
    results = layouts.equality_benchmark(trainings, folder, facts, patience=config.patience)
    show("\n\n".join([layouts.markdown(results, facts), "\n".join(str(folder / name) for name in layouts.FILES)]))
    if any(layouts.is_wrong(result, results[0]) for result in results):
        raise SystemExit(1)


@command(LayerBenchmarkConfig, config_name="benchmark_layers")
def layers(config: LayerBenchmarkConfig) -> None:
    """Measures way after way and prints the report."""
    device = choose_device(config.device)
    folder = _make_folder(config.output_dir, "output_dir")
    facts = describe("layers") if device.type == "cuda" else _date_and_command("layers")
    figures: list[data_report.Measured] = []
    for figure in measure_layers(config, device):
        figures.append(figure)
        write_atomically(folder / LAYERS_FILE, data_report.to_csv(figures, facts))
    show(f"{data_report.markdown(figures, facts)}\n\n{folder / LAYERS_FILE}")


@command(BenchmarkConfig, config_name="benchmark")
def attention(config: BenchmarkConfig) -> None:
    """Measures row after row, keeps the files up to date, and prints the report."""
    results = benchmark(config)
    folder = Path(config.output_dir)
    missing = [f"{row.value}: not installed" for row in config.rows if not is_installed(row)]
    show("\n\n".join([markdown(results, describe(), missing), "\n".join(str(folder / name) for name in FILES)]))
    if any(result.is_wrong for result in results):
        raise SystemExit(1)


def benchmark(config: BenchmarkConfig) -> list[Result]:
    """All results, after the files are written. Raises ConfigError, before any measurement, where there is nothing to measure with."""
    if not torch.cuda.is_available():
        raise ConfigError("attention: needs a CUDA device and torch sees none")
    trained = None
    if KernelInputs.TRAINED in config.inputs:
        trained = Trained.open(config, CudaMeter.device)
        config = with_heads_of(config, trained.model.config)
    cases = [(row, case) for row, case in all_cases(config, trained) if is_installed(row)]
    if not cases:
        shown = ", ".join(row.value for row in config.rows)
        raise ConfigError(f"rows={shown}: none can be measured; see dense_up_to={config.dense_up_to} and what is installed")
    folder, meter = _make_folder(config.output_dir, "output_dir"), CudaMeter()
    results: list[Result] = []
    for row, case in cases:
        result = measure(row, case, meter)
        results.append(result)
        found = result.problem or ", ".join(f"{name} {timing.median:.4g} ms" for name, timing in result.eager.items())
        print(f"{case.num_tokens:,} tokens, {label(case)}, {row.value}: {found}", file=sys.stderr, flush=True)
        _write(folder, results)
    return results


def with_heads_of(config: BenchmarkConfig, model: ModelConfig) -> BenchmarkConfig:
    """The config with the checkpoint's heads, so that all inputs have the same shapes. Raises ConfigError where others are asked for."""
    heads = {key: getattr(model, key) for key in ("num_heads", "num_kv_heads", "head_dim")}
    for key, value in heads.items():
        if getattr(config, key) not in (value, getattr(BenchmarkConfig, key)):
            raise ConfigError(f"{key}={getattr(config, key)}: the model of checkpoint={config.checkpoint} has {value}; leave it out")
    print(", ".join(f"{key}={value}" for key, value in heads.items()) + f": those of {config.checkpoint}", file=sys.stderr, flush=True)
    return replace(config, **heads)


def describe(word: str = "attention") -> dict[str, str]:
    """What the results were found on and with."""
    import triton  # not installed everywhere; where there is a CUDA device it is

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton.__version__,
        **_date_and_command(word),
    }


def _date_and_command(word: str) -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "scripts.benchmark", word, *sys.argv[1:]]),
    }


def _make_folder(path: str, key: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"{key}={folder}: is a file; choose a folder") from None
    except OSError as error:
        raise ConfigError(f"{key}={folder}: cannot be made ({error.strerror})") from None
    return folder


def _write(folder: Path, results: Sequence[Result]) -> None:
    """Each file whole, beside and then renamed. Raises ConfigError where one cannot be written."""
    table, figure = (folder / name for name in FILES)
    facts = describe()
    try:
        beside = folder / f".{table.name}.partial"
        beside.write_text(to_csv(results, facts))
        beside.replace(table)
        panels = {f"{name} (ms)": lines for name, lines in series(results).items()}
        plot_over_lengths(figure, f"Attention on {facts['gpu']}, {facts['date']}", panels)
    except BaseException as error:
        for name in FILES:
            (folder / f".{name}.partial").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"output_dir={folder}: cannot be written ({error.strerror})") from None
        raise


COMMANDS = {"attention": attention, "layers": layers, "train": train, "equality": equality, "data": data}

if __name__ == "__main__":
    run(main, interrupted="the rows that were finished are in output_dir")
