"""`python -m scripts.inspect_data`: what it says of a corpus, which texts it shows, which mistakes it names."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.registry import REPOSITORY
from configs.schema import MixConfig, MixSourceConfig, Packing, SourceConfig, SourceFormat
from data.mix import report
from data.prepare import prepare
from data.shards import Corpus
from scripts import inspect_data as door
from tests.data.conftest import jsonl_config, make_texts, model_file, write_jsonl  # noqa: F401 (fixtures)
from tests.train.helpers import execute


@pytest.fixture
def folder(jsonl_config, tmp_path) -> Path:  # noqa: F811
    """A corpus of two sources in a folder whose name needs quoting."""
    sources = (
        SourceConfig(name="few", format=SourceFormat.JSONL, path=str(write_jsonl(tmp_path / "few.jsonl", make_texts(10, seed=2)))),
        SourceConfig(name="many", format=SourceFormat.JSONL, path=str(write_jsonl(tmp_path / "many.jsonl", [*make_texts(50), "", "x"]))),
    )
    config = replace(jsonl_config([]), sources=sources, prepared_dir=str(tmp_path / "my 'own' corpus"))
    prepare(config)
    return Path(config.prepared_dir)


@pytest.fixture
def ask(monkeypatch, folder, tmp_path, capsys):
    """Runs the command on the corpus: its exit status, output and errors."""

    def run(*arguments: str, place: Path = folder) -> tuple[int, str, str]:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", ["inspect_data", str(place), *arguments, f"output_dir={tmp_path / 'out'}"])
        try:
            door.main()
        except SystemExit as ended:
            return ended.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_it_says_what_the_corpus_holds(ask, folder, tmp_path):
    status, said, errors = ask("verify=true")
    assert (status, errors) == (0, "")
    corpus = Corpus.open(folder)
    for split in ("train", "heldout"):
        counts = corpus.manifest.splits[split]
        assert re.search(
            rf"^{split} +{counts.documents} documents +{counts.tokens:,} tokens .* longest {counts.longest:,} tokens", said, re.M
        )
        for source, part in counts.by_source.items():
            share = f"{part['tokens'] / counts.tokens:.1%}"
            assert re.search(rf"^  {source} +{part['documents']} documents +{part['tokens']:,} tokens +{share}$", said, re.M)
    assert f"hash {corpus.tokenizer_hash}" in said and "left out: 1 empty" in said and "left out: 1 too_short" in said
    assert "every file matches its checksum" in said
    rows = re.findall(r"^ *([\d,]+)\.\.([\d,]+) +(\d+) +([\d,]+) +(\d+) +([\d,]+) ", said, re.M)
    figures = [[int(number.replace(",", "")) for number in row] for row in rows]
    lengths = {split: corpus.split(split).lengths for split in ("train", "heldout")}
    for low, high, *counted in figures:
        expected = []
        for split in ("train", "heldout"):
            inside = [int(n) for n in lengths[split] if low <= n <= high]
            expected += [len(inside), sum(inside)]
        assert counted == expected
    assert sum(row[2] for row in figures) == len(lengths["train"])
    picture = tmp_path / "out" / f"{folder.name}-lengths.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in said


def test_shares_of_long_documents(ask, monkeypatch, folder):
    monkeypatch.setattr(door, "LONG", (512, 1024))
    said = ask()[1]
    for split in ("train", "heldout"):
        lengths = Corpus.open(folder).split(split).lengths
        for name, least in (("512", 512), ("1K", 1024)):
            assert re.search(rf"{name}: .*{lengths[lengths >= least].sum() / lengths.sum():.1%} {split}", said)


def test_it_says_what_a_mix_trains_on(ask, folder):
    sources = "mix.sources=[{name: few, weight: 0.75}, {name: many, weight: 0.25}]"
    status, said, _ = ask(sources, "mix.packing=separate", "seq_len=64", "training_tokens=100000")
    table = Corpus.open(folder).split("train")
    mix = MixConfig(sources=(MixSourceConfig(name="few", weight=0.75), MixSourceConfig(name="many", weight=0.25)), packing=Packing.SEPARATE)
    found = report(table, mix, tokens=100_000, seq_len=64)
    assert status == 0 and f"100,000 training tokens under this mix, in rows of 64 (separate, {found.padding:.1%} padding)" in said
    for pool in found.pools:
        assert re.search(rf"^  {pool.name} .* {pool.share:.1%} of training, {pool.epochs:.3g} epochs$", said, re.M)
    assert "  from documents of at least 8K: 0.0%, 32K: 0.0%, 128K: 0.0%" in said
    status, said, errors = ask("mix.min_document_tokens=99999")
    assert (status, said) == (2, "") and errors.startswith("error: mix.min_document_tokens=99999: no document is left")


def test_it_shows_documents_and_ranges_of_tokens(ask, folder):
    corpus = Corpus.open(folder)
    table = corpus.split("heldout")
    whole = corpus.tokenizer.decode(table.tokens(2))
    status, said, _ = ask("split=heldout", "document=2")
    head, text = said.split("\n", 1)
    assert status == 0 and text == whole + "\n" and len(whole) > 20
    assert head.startswith("--- heldout document 2, source ") and table.text_hash(2) in head
    assert ask("split=heldout", "document=2", "tokens=3..9")[1].split("\n", 1)[1] == corpus.tokenizer.decode(table.tokens(2, 3, 9)) + "\n"
    begin = int(table.lengths[:2].sum())
    across = ask("split=heldout", f"tokens={begin - 4}..{begin + 6}")[1]
    heads = re.findall(r"^--- heldout document (\d+), source \w+, tokens ([\d,]+)\.\.([\d,]+) of", across, re.M)
    assert heads == [("1", f"{table.lengths[1] - 4:,}", f"{table.lengths[1]:,}"), ("2", "0", "6")]


def test_contamination_is_reported(ask, jsonl_config, tmp_path):  # noqa: F811
    texts = make_texts(40)
    config = jsonl_config([*texts, *(f"again {text}" for text in texts)], prepared_dir=str(tmp_path / "copies"), heldout_fraction=0.3)
    prepare(config)
    status, said, errors = ask("contamination=true", place=tmp_path / "copies")
    assert (status, errors) == (0, "")
    found = re.search(r"contamination: (\d+) of (\d+) held-out documents share windows of 13 tokens", said)
    assert 5 < int(found[1]) <= int(found[2]) and "as in train document" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["document=999"], "document=999: the train split has "),
        (["document=0", "tokens=0..99999"], "tokens=0..99999: document 0 has "),
        (["tokens=5..5"], "tokens=5..5: must be FIRST..STOP, such as 1000..1200"),
        (["split=test"], "split=test: accepted: train, heldout"),
        (["dokument=3"], "dokument: no such key, did you mean 'document'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(ask, arguments, message, folder):
    status, said, errors = ask(*arguments)
    assert (status, said, errors.count("\n")) == (2, "", 1) and errors.startswith(f"error: {message}")


def test_the_program_as_it_is_typed(tmp_path):
    command = [sys.executable, "-m", "scripts.inspect_data"]
    none = execute(command)
    assert (none.returncode, none.stderr) == (
        2,
        "error: prepared_dir='': must be given: python -m scripts.inspect_data FOLDER\n",
    )
    missing = execute([*command, str(tmp_path / "none")])
    assert missing.returncode == 2 and missing.stderr.startswith(f"error: data.prepared_dir={tmp_path}/none: no prepared corpus there")
