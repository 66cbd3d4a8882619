"""Opening a corpus of very many documents: its time and memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from configs.registry import REPOSITORY
from configs.schema import DataBenchmarkConfig, DataConfig
from data.manifest import INDEX, Manifest, SplitManifest, config_content, describe_file
from data.tokenizer import load_tokenizer, train_tokenizer
from scripts.data_benchmark.report import Measured

_BATCH = 1 << 20
_LENGTHS = (300, 1500)  # tokens of a document, drawn evenly from [low, high)
_PROGRAM = """
import json, re, sys, time
start = time.perf_counter()
from data.shards import Corpus
imported = time.perf_counter()
table = Corpus.open(sys.argv[1], verify=False).split("train")  # as by default where shards are as large
assert len(table.tokens(table.num_documents - 1)) == table.lengths[-1]
seconds = time.perf_counter() - imported
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])  # getrusage would count the parent's memory too
print(json.dumps([seconds, imported - start, peak]))
"""


def opening(config: DataBenchmarkConfig, folder: Path) -> list[Measured]:
    """Seconds and peak memory of a process that opens a corpus, reads all lengths and the last document."""
    corpus = folder / "many"
    make_corpus(corpus, config.documents)
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(corpus)], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    seconds, importing, peak = json.loads(done.stdout)
    what = f"opening {config.documents:,} documents"
    return [
        Measured(name=what, value=seconds, unit="s", target="< 2 s", note=f"and {importing:.2g} s to import"),
        Measured(name=f"{what}, memory of the process", value=peak / 1e6, unit="MB", target="< 300 MB"),
    ]


def make_corpus(folder: Path, documents: int) -> None:
    """A finished corpus of that many documents with a real index; its one shard is a hole on the disk and reads as zeros."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(["a few words to learn from\n" * 20], vocab_size=300))
    tokenizer = load_tokenizer(folder)
    rng = np.random.default_rng(0)
    tokens = longest = 0
    with open(folder / "train-index.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": INDEX.descr, "fortran_order": False, "shape": (documents,)})
        for first in range(0, documents, _BATCH):
            records = np.zeros(min(_BATCH, documents - first), INDEX)
            records["length"] = rng.integers(*_LENGTHS, len(records))
            ends = tokens + np.cumsum(records["length"], dtype=np.uint64)
            records["offset"], records["bytes"] = ends - records["length"], 4 * records["length"]
            records["hash"] = rng.integers(0, 256, (len(records), 16), np.uint8)
            tokens, longest = int(ends[-1]), max(longest, int(records["length"].max()))
            file.write(records.tobytes())
    np.save(folder / "heldout-index.npy", np.zeros(0, INDEX))
    with open(folder / "train-00000.bin", "wb") as file:
        file.truncate(2 * tokens)
    counts = {"documents": documents, "tokens": tokens, "bytes": 4 * tokens}
    none = dict.fromkeys(counts, 0)
    files = {path.name: describe_file(path) for path in folder.iterdir() if path.suffix != ".bin"}
    Manifest(
        tokenizer_file=tokenizer.file_name,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype="<u2",
        sources=["made"],
        splits={
            "train": SplitManifest(**counts, longest=longest, shards=["train-00000.bin"], by_source={"made": counts}),
            "heldout": SplitManifest(**none, longest=0, shards=[], by_source={"made": none}),
        },
        dropped={},
        files=files | {"train-00000.bin": {"size": 2 * tokens, "blake2b": "not taken: a hole of gigabytes"}},
        config=config_content(DataConfig()),
    ).save(folder)
