"""The data benchmark: it measures what it says, on small inputs, and leaves its file alone behind."""

import csv
import sys
from pathlib import Path

import pytest

from configs.registry import REPOSITORY
from configs.schema import DataBenchmarkConfig, DataRow
from data.shards import Corpus
from scripts import benchmark as door
from scripts.data_benchmark import opening, preparing
from scripts.data_benchmark.report import Measured, markdown, to_csv
from scripts.data_benchmark.rows import MEASURES


def test_every_row_is_measured():
    assert list(MEASURES) == list(DataRow)


def test_opening_measures_a_real_corpus(tmp_path):
    opening.make_corpus(tmp_path / "made", 3000)
    table = Corpus.open(tmp_path / "made", verify=False).split("train")
    assert table.lengths.sum() == table.num_tokens and len(table.tokens(2999)) == table.lengths[-1]
    assert len({table.text_hash(document) for document in range(3000)}) == table.num_documents == 3000
    seconds, peak = opening.opening(DataBenchmarkConfig(documents=2000), tmp_path)
    assert (seconds.unit, peak.unit) == ("s", "MB") and 0 < seconds.value < 60 and 10 < peak.value < 300


def test_copies_differ_and_add_up():
    copies = list(preparing._copies(["one\n", "two\n"], 100))
    assert len(set(copies)) == len(copies) and 100 <= sum(map(len, copies)) < 100 + len(copies[-1])
    assert [text.split("\n")[1] for text in copies[:4]] == ["one", "two", "one", "two"]


def test_the_command_writes_its_file_and_nothing_else(tmp_path, monkeypatch, capsys):
    figure = Measured(name="thing", value=1234.5, unit="MB/s", target="> 1", note="well")
    made = []

    def measure(config, folder: Path):
        (folder / "large").write_text("scratch")
        made.append(folder)
        return [figure]

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(door, "MEASURES", {DataRow.PREPARING: measure})
    places = [f"output_dir={tmp_path / 'out'}", f"scratch_dir={tmp_path / 'scratch'}"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", "rows=preparing", *places])
    door.main()
    said = capsys.readouterr().out
    assert "| thing | 1,234 MB/s | > 1 | well |" in said and "cores " in said
    rows = list(csv.DictReader((tmp_path / "out" / "data.csv").open()))
    assert len(rows) == 1 and (rows[0]["name"], rows[0]["value"], rows[0]["unit"]) == ("thing", "1234.5", "MB/s")
    assert len(made) == 1 and list((tmp_path / "scratch").iterdir()) == []


def test_the_report_is_a_table():
    figures = [Measured(name="a", value=0.01234, unit="s"), Measured(name="b|", value=7, unit="MB")]
    assert markdown(figures, {"cores": "2"}).splitlines()[4:] == ["| a | 0.0123 s |  |  |", "| b| | 7 MB |  |  |"]
    assert to_csv(figures, {"cores": "2"}).splitlines() == ["name,value,unit,target,note,cores", "a,0.01234,s,,,2", "b|,7,MB,,,2"]


@pytest.mark.slow
def test_preparing_keeps_up_with_the_library(tmp_path):
    """A third of its rate at least, whatever else this machine does; the benchmark says how near it comes."""
    figures = preparing.preparing(DataBenchmarkConfig(text_bytes=20_000_000), tmp_path)
    for alone, whole in zip(figures[::2], figures[1::2], strict=True):
        assert alone.name.startswith("library alone") and whole.name.startswith("preparing") and whole.value > alone.value / 3


@pytest.mark.parametrize(
    ("arguments", "message"), [(["rows=[]"], "rows=[]: must hold at least one"), (["rows=opning"], "rows.0='opning': no such")]
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        door.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1
