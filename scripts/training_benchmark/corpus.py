"""A corpus without text: documents of random tokens, all as long as a row."""

from pathlib import Path

import numpy as np

from configs.schema import DataConfig
from data.manifest import SPLITS, Manifest, config_content, describe_file
from data.writer import SplitWriter

_SOURCE = "random"


def make_corpus(folder: Path, *, documents: int, document_tokens: int, vocab_size: int) -> None:
    """Writes a prepared corpus whose training rows of `document_tokens` tokens are whole documents, and nothing held out."""
    folder.mkdir(parents=True)
    rng, dtype = np.random.default_rng(0), np.dtype("<u4")
    splits = {}
    for split in SPLITS:
        writer = SplitWriter(folder, split, dtype, documents * document_tokens)
        for number in range(documents if split == "train" else 0):
            tokens = rng.integers(vocab_size, size=document_tokens, dtype=np.uint32)
            writer.append(tokens, source=0, num_bytes=0, digest=number.to_bytes(16, "little"))
        splits[split] = writer.finish([_SOURCE])
        writer.close()
    Manifest(
        tokenizer_file="",
        tokenizer_hash="",
        vocab_size=vocab_size,
        bos_id=0,
        eos_id=0,
        dtype=dtype.str,
        sources=[_SOURCE],
        splits=splits,
        dropped={},
        files={path.name: describe_file(path) for path in folder.iterdir()},
        config=config_content(DataConfig()),
    ).save(folder)
