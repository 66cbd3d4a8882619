"""How a run begins with weights that exist: converted ones, or those of a checkpoint, without its optimizer and its place in the data."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.mapping import to_mapping
from configs.model_file import INIT_FILE, MODEL_FILE, ModelFile, describe, initial, note
from configs.schema import ConfigError, RunConfig, StageConfig
from data.shards import Corpus
from data.tokenizer import copy_tokenizer, tokenizer_hashes
from model.hf import parameter_shapes
from model.transformer import Transformer
from train.checkpoint import ENGINE, TrainingState, read_state, resolve
from train.distributed import gather_objects
from train.fragments import FragmentFolder
from train.run_dir import TOKENIZER, unwritable
from train.weights import Shape, WeightFolder, check_shapes, fill


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights by our names, the model that they are of, and the tokenizer they read."""

    folder: Path
    """A converted folder or a checkpoint."""
    described: ModelFile
    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    """As safetensors writes them."""
    read: Callable[[str], Tensor]
    tokenizer: Path | None
    """Folder of the tokenizer's files; None where there are none."""
    tokenizer_hashes: list[str]
    """Of the tokenizers that the weights were made with; empty where that is not known."""


def is_converted(folder: Path) -> bool:
    """Whether `scripts.convert from_hf` made it."""
    return (folder / MODEL_FILE).is_file()


def open_source(path: str) -> Source:
    """The weights in `path`: a converted folder, a checkpoint, or the latest checkpoint of a run's folder.

    Raises ConfigError, `path` first, where it is none of these, is damaged, or does not hold the tensors that its model has.
    """
    described = describe(path)
    if is_converted(Path(path)):
        folder = Path(path)
        weights = WeightFolder(folder)
        hashes = tokenizer_hashes(folder)
        source = Source(
            folder=folder,
            described=described,
            shapes=weights.shapes,
            dtypes=weights.dtypes,
            read=weights.read,
            tokenizer=folder if hashes else None,
            tokenizer_hashes=hashes,
        )
    else:
        source = _open_checkpoint(resolve(path, lambda text: print(text, file=sys.stderr)))
    said_by = MODEL_FILE if is_converted(source.folder) else "state.json"
    check_shapes(source.shapes, parameter_shapes(source.described.model), where=source.folder, said_by=said_by)
    return source


def _open_checkpoint(folder: Path) -> Source:
    state = read_state(folder)
    run = state.run()
    saved = FragmentFolder(folder / ENGINE)
    places = (folder.parent.parent / TOKENIZER, Path(run.data.prepared_dir))
    return Source(
        folder=folder,
        described=describe(str(folder)),
        shapes=saved.shapes,
        dtypes=dict.fromkeys(saved.shapes, "F32"),
        read=saved.weight,
        tokenizer=next((place for place in places if state.tokenizer_hash in tokenizer_hashes(place)), None),
        tokenizer_hashes=[state.tokenizer_hash],
    )


def state_of(folder: Path) -> TrainingState:
    """The state in a checkpoint; of converted weights one of no steps, whose stage is the model's own context and attention.

    Raises ConfigError where this version does not know what lies there.
    """
    if not is_converted(folder):
        return read_state(folder)
    described = describe(str(folder))
    length = described.model.max_seq_len
    stage = StageConfig(seq_len=length, batch_tokens=length, tokens=length, attention=described.attention, rope=described.rope)
    return TrainingState(
        step=0,
        tokens=0,
        stream={},
        skipped=0,
        skipped_in_a_row=0,
        world_size=1,
        tokenizer_hash=next(iter(tokenizer_hashes(folder)), ""),
        config=to_mapping(RunConfig(name=folder.name, model=described.model, stages=(stage,))),
        git={"commit": None, "dirty": None},
    )


def tokenizers_of(folder: Path) -> list[str]:
    """Hashes of the tokenizers that the weights in a checkpoint or a converted folder were made with; none where that is not known."""
    return tokenizer_hashes(folder) if is_converted(folder) else [read_state(folder).tokenizer_hash]


def load_into(model: Transformer, folder: Path) -> None:
    """Gives a model of the same shapes the weights in a verified checkpoint or a converted folder. Raises ConfigError."""
    if is_converted(folder):
        source = open_source(str(folder))
        fill(model, source.shapes, source.read)
    else:
        saved = FragmentFolder(folder / ENGINE)
        fill(model, saved.shapes, saved.weight)


def begin_from(run: RunConfig, model: Transformer, corpus: Corpus) -> None:
    """Fills the model with the weights of `run.init_from`; every rank calls it before DeepSpeed takes the model.

    Raises ConfigError on all ranks where one cannot read them, where they are read differently, and where the corpus was made with
    another tokenizer.
    """
    try:
        source = open_initial(run, corpus)
        fill(model, source.shapes, source.read)
        result = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
        problem = None
    except ConfigError as error:
        result, problem = 0.0, str(error)
    found = gather_objects((result, problem))
    if problems := [text for _, text in found if text]:
        raise ConfigError(problems[0])
    if len({total for total, _ in found}) > 1:
        raise ConfigError(f"init_from={run.init_from}: the ranks read different weights there; give all machines the same files")


def open_initial(run: RunConfig, corpus: Corpus | None) -> Source:
    """The weights of `run.init_from`. Raises ConfigError as `open_source` does, and where the corpus (None: there is none to check yet)
    was made with another tokenizer."""
    try:
        source = open_source(run.init_from)
    except ConfigError as error:
        raise ConfigError(f"init_from={error}") from None
    if corpus and source.tokenizer_hashes and corpus.tokenizer_hash not in source.tokenizer_hashes:
        place = source.tokenizer or source.folder
        raise ConfigError(
            f"init_from={run.init_from}: its weights were made with tokenizer {' or '.join(source.tokenizer_hashes)}, the corpus in "
            f"data.prepared_dir={run.data.prepared_dir} with {corpus.tokenizer_hash}; prepare it with data.tokenizer.path={place}"
        )
    return source


def note_beginning(run: RunConfig, folder: Path, corpus: Corpus) -> None:
    """Keeps in the run's folder what a resume or an export would otherwise look for elsewhere: the model that `init_from` is and the
    tokenizer with its companions. For rank 0. Raises ConfigError where the disk is full."""
    try:
        if run.init_from and not (folder / INIT_FILE).is_file():
            note(folder, run.init_from, initial(run.run_dir, run.init_from, run.resume))
        if not (folder / TOKENIZER).is_dir():
            beside = folder / f".{TOKENIZER}.partial"
            beside.mkdir(exist_ok=True)
            copy_tokenizer(_tokenizer_of(run, corpus), beside)
            beside.replace(folder / TOKENIZER)
    except OSError as error:
        raise unwritable(f"run_dir={folder}", error) from None


def _tokenizer_of(run: RunConfig, corpus: Corpus) -> Path:
    """Where the corpus's tokenizer lies with the most companions: beside the weights the run began with, else in the corpus."""
    given = [Path(path) for path in (run.init_from, run.resume) if path]
    for folder in (place for path in given for place in (path, path / TOKENIZER, path.parent.parent / TOKENIZER)):
        if corpus.tokenizer_hash in tokenizer_hashes(folder):
            return folder
    return corpus.folder
