"""Small corpora, made once."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import DataConfig, SourceConfig, SourceFormat, TokenizerConfig, TokenizerKind
from data.tokenizer import train_tokenizer

WORDS = (
    "block",
    "gate",
    "query",
    "key",
    "value",
    "head",
    "sparse",
    "dense",
    "token",
    "layer",
    "past",
    "own",
    "softmax",
    "rope",
    "scale",
    "mean",
    "score",
    "stage",
    "row",
    "shard",
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """`count` different texts of 1 to 60 lines, with indentation, tabs and characters outside ASCII."""
    rng = random.Random(seed)

    def line() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        return " " * rng.choice((0, 4, 8)) + words + rng.choice(("", ".", "\t", " é", " 漢"))

    return [f"text {seed} {i}\n" + "\n".join(line() for _ in range(rng.randint(1, 60))) for i in range(count)]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    """A sentencepiece model of 384 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(make_texts(60, seed=9), vocab_size=384))
    return path


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def jsonl_config(tmp_path, model_file):
    """A DataConfig over a jsonl file of the given texts; keyword arguments replace fields of it."""

    def make(texts: list[str], **changes) -> DataConfig:
        path = write_jsonl(tmp_path / "texts.jsonl", texts)
        config = DataConfig(
            prepared_dir=str(tmp_path / "corpus"),
            sources=(SourceConfig(name="lines", format=SourceFormat.JSONL, path=str(path)),),
            tokenizer=TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path=str(model_file)),
            heldout_fraction=0.2,
            num_workers=1,
        )
        return replace(config, **changes)

    return make
