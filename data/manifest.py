"""What a prepared folder says about itself: counts, tokenizer, the config that made it, and a checksum of every file.

manifest.json                      this
tokenizer.model | tokenizer.json   (and tokenizer_config.json where there was one)
train-00000.bin ...                token ids, little-endian uint16 or uint32; per document [bos] tokens [eos]
train-index.npy                    one INDEX record per document
heldout-00000.bin ..., heldout-index.npy
"""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from configs.mapping import to_mapping
from configs.schema import ConfigError, DataConfig

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "heldout")

INDEX = np.dtype(
    [
        ("offset", "<u8"),  # first token (its bos) in the shard
        ("length", "<u8"),  # tokens, both separators included
        ("bytes", "<u8"),  # of the text in UTF-8
        ("shard", "<u4"),
        ("source", "<u4"),  # position in the manifest's sources
        ("hash", "u1", (16,)),  # blake2b of the text
    ]
)

_NOT_CONTENT = ("name", "prepared_dir", "streaming", "num_workers")  # fields of DataConfig that leave the corpus as it is


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """Counts of one split. Tokens include the separators; bytes are those of the text; longest is in tokens."""

    documents: int
    tokens: int
    bytes: int
    longest: int
    shards: list[str]
    by_source: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`."""

    format_version: int = FORMAT_VERSION
    tokenizer_file: str
    tokenizer_hash: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: str
    sources: list[str]
    splits: dict[str, SplitManifest]
    dropped: dict[str, int]  # documents left out, by reason
    dropped_names: dict[str, list[str]] = field(default_factory=dict)  # the first few of each reason
    files: dict[str, dict[str, Any]]
    config: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` with a checksum of its own."""
        content = asdict(self)
        (folder / FILE_NAME).write_text(json.dumps(content | {"checksum": _own_checksum(content)}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises ConfigError, naming the file, where it is missing, damaged or of another format."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum")
            version = content["format_version"]
        except (FileNotFoundError, NotADirectoryError):
            if is_occupied(folder):
                raise ConfigError(
                    f"data.prepared_dir={folder}: is no prepared corpus, {FILE_NAME} is missing; name another folder"
                ) from None
            command = f"python -m scripts.prepare_data data=bundled {shlex.quote(f'data.prepared_dir={folder}')}"
            raise ConfigError(
                f"data.prepared_dir={folder}: no prepared corpus there; `{command}` makes one of text that is installed, "
                "and configs/data/ says how to make one of your own"
            ) from None
        except OSError as error:
            raise unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(path, "is not a manifest") from None
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: format {version}, this code reads format {FORMAT_VERSION}; prepare again with overwrite=true")
        if checksum != _own_checksum(content):
            raise damaged(path, "does not match its checksum")
        splits = {name: SplitManifest(**split) for name, split in content.pop("splits").items()}
        return cls(splits=splits, **content)


def is_occupied(folder: Path) -> bool:
    """Whether something other than an empty folder lies there. Raises ConfigError where the system does not say."""
    try:
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise unreadable(folder, error) from None


def damaged(path: Path, problem: str) -> ConfigError:
    """The error for a file that is not what preparation wrote."""
    return ConfigError(f"{path}: {problem}; prepare again with overwrite=true")


def unreadable(path: Path, error: OSError) -> ConfigError:
    """The error for a file or folder of a corpus that the system does not let us read."""
    return ConfigError(f"{path}: cannot be read ({error.strerror})")


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and blake2b digest (hex) of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"size": path.stat().st_size, "blake2b": digest.hexdigest()}


def config_content(config: DataConfig) -> dict[str, Any]:
    """The fields that decide what a corpus holds, as JSON values."""
    return {key: value for key, value in to_mapping(config).items() if key not in _NOT_CONTENT}


def _own_checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


assert {item.name for item in fields(DataConfig)} >= set(_NOT_CONTENT)
