"""The page on a run or a sweep: what it shows, and that it is one valid file without a reference to any other."""

import csv
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.mapping import to_mapping
from configs.registry import REPOSITORY
from scripts import report as door
from scripts.figures import plot_losses
from scripts.report import make_page
from scripts.reporting.charts import short, thinned
from scripts.reporting.page import Page, render
from scripts.sweeps.results import COLUMNS
from tests.train.helpers import make_run

_VOID = {"meta", "img", "br", "hr", "input", "link"}


class Reader(HTMLParser):
    """Text, attributes, and whether every tag is closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())


def read(page: Page) -> str:
    """The text of a page, after it is found to be whole and by itself."""
    html, reader = render(page), Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [] and html.startswith("<!DOCTYPE html>")
    ids = [value for name, value in reader.attributes if name == "id"]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    referred = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href")]
    assert [value for value in referred if value.removeprefix("#") not in ids and not value.startswith("data:image/png;base64,")] == []
    assert set(re.findall(r"url\(#?([^)]*)\)", html)) <= set(ids)
    assert {url for url in re.findall(r"https?://[\w./]*", html) if "www.w3.org" not in url} == set() and "<script" not in html
    return " ".join(filter(None, reader.text))


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def step(number: int, **more) -> dict:
    line = {"step": number, "loss": 8 / number, "lr": 0.001, "grad_norm": 1.0, "tokens": 512 * number, "context": 128, "memory_gib": 0.5}
    line |= {"tokens_per_second": 1000.0 + number, "mfu_executed": None, "mfu_dense_equivalent": None, "data_wait": 0.01}
    return line | {"skipped_steps": 0, "step_seconds": 0.5, "tokens_by": {}, **more}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "run"
    gate = {"mass": {"layer_1": 0.5}, "heads": {"mass": [None, [0.25, 0.75]]}}
    lines = [step(number) for number in range(1, 9)]
    lines.insert(4, {"event": "evaluation", "step": 4, "heldout_loss": 2.5, "by_position": {"0": 3.0, "64": 2.0}})
    lines += [{"event": "gate", "step": 8, "context": 128, **gate}, {"event": "switch", "step": 8, "stage": "<last>", "loss_before": 1.5}]
    lines += [step(8, loss=None), {"event": "evaluation", "step": 8, "heldout_loss": 2.125}]
    write_lines(folder / "metrics.jsonl", lines)
    run = make_run(tmp_path / "corpus", folder, 'name="a & b"')
    (folder / "config.json").write_text(json.dumps(to_mapping(run)))
    return folder


# --- a run -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_in_figures_and_words(run_dir):
    page = make_page(run_dir)
    said = read(page)
    assert dict(page.facts) == {
        "steps": "8 of 8",
        "tokens": "4.096K",
        "training loss": f"{8 / 7:.4f}",
        "held-out loss": "2.1250",
        "tokens/s, median": "1,004",
        "peak memory": "0.5 GiB",
        "skipped steps": "0",
    }
    for words in (
        "a & b",
        "stage=<last>, loss_before=1.5",
        "moba",
        "mass of each head, step 8",
        "loss (nats a token)",
        "held out",
        "layer",
    ):
        assert words in said
    captions = [figure.caption for section in page.sections for figure in section.figures]
    assert "MFU" not in captions and "step seconds" not in captions  # there is none; and speed says it already


def test_a_figure_that_training_adds_is_drawn_by_itself(run_dir):
    write_lines(run_dir / "metrics.jsonl", [step(number, recompiles=number // 2, constant=3) for number in range(1, 5)])
    captions = [figure.caption for section in make_page(run_dir).sections for figure in section.figures]
    assert "recompiles" in captions and "constant" not in captions


def test_what_other_commands_left_is_taken_in(run_dir):
    evaluation = run_dir / "evaluation"
    evaluation.mkdir()
    plot_losses(evaluation / "position.png", {"run": run_dir / "metrics.jsonl"})
    (evaluation / "needle.png").write_bytes((evaluation / "position.png").read_bytes())
    text = (
        "# Perplexity\n\n<script>no</script> & more\n\n| attention | loss |\n|---|---:|\n| full | 2.5 |\n\n![By position](position.png)\n"
    )
    (evaluation / "evaluation.md").write_text(text + "\n![elsewhere](https://example.org/a.png)\n")
    page = make_page(run_dir)
    said = read(page)
    for words in (
        "evaluation/evaluation.md",
        "Perplexity",
        "<script>no</script> & more",
        "attention",
        "[elsewhere]",
        "evaluation/needle.png",
    ):
        assert words in said
    assert render(page).count('<img src="data:image/png;base64,') == 2  # the one in the text is not shown again


def test_a_run_without_its_settings_has_a_page_that_says_so(run_dir):
    (run_dir / "config.json").unlink()
    said = read(make_page(run_dir))
    assert "4.096K" in said and "config.json is not there: neither stages nor settings are shown." in said


def test_damaged_lines_are_left_out_and_counted(run_dir):
    whole = make_page(run_dir)
    assert whole.notes == []
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "loss": 1.0}\n{"event": "gate", "step": 8}\n[]\n\n\xff\x00\n{"step": 9, "lo')
    page = make_page(run_dir)
    assert page.facts == whole.facts and f"Damaged lines of {run_dir}/metrics.jsonl, left out: 5." in read(page)
    assert page.notes == make_page(run_dir.parent).notes


# --- a sweep ---------------------------------------------------------------------------------------------------------------------------


def test_a_sweep_in_figures_and_words(run_dir, tmp_path):
    sweep = tmp_path / "sweep"
    rows = []
    for size, compute in (("small", 10**15), ("large", 3 * 10**17)):
        for arm in ("full", "moba(64, 3)"):
            write_lines(sweep / f"{size}-{arm}" / "metrics.jsonl", [step(number) for number in range(1, 4)])
            row = dict.fromkeys(COLUMNS, "1") | {"key": f"{size}-{arm}", "job": f"{size}-{arm}", "arm": arm, "tokens": 10**6}
            row |= {"seconds": 1800, "flops_6nd": compute, "flops_executed": 2 * compute, "heldout_loss": 3.25 - compute / 1e18}
            rows.append(row | {"trailing_loss": "", "loss_from_0": 4, "loss_from_64": 3})
    with (sweep / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (sweep / "tiny-full.error").write_text("lr=0: must be positive\n")
    page = make_page(sweep)
    said = read(page)
    expected = {"jobs done": "4", "jobs failed": "1", "tokens": "4M", "hours": "2.00", "lowest held-out loss": "2.9500"}
    assert dict(page.facts) == expected
    for words in ("held-out loss over 6ND FLOPs", "large-moba(64, 3)", "tiny-full", "lr=0: must be positive", "heldout loss", "1e+17"):
        assert words in said
    assert "trailing loss" not in said  # no job has it


def test_a_folder_of_runs_is_shown_side_by_side(run_dir):
    page = make_page(run_dir.parent)
    assert dict(page.facts)["runs"] == "1" and "training loss" in read(page)


# --- the command -----------------------------------------------------------------------------------------------------------------------


def typed(monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    door.main()


def test_the_command_writes_the_page(run_dir, monkeypatch, capsys):
    typed(monkeypatch, str(run_dir))
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "folder='': must be given: python -m scripts.report FOLDER"),
        (["RUN/none"], "folder=RUN/none: no such folder"),
        (["RUN/empty"], "folder=RUN/empty: holds neither the metrics.jsonl of a run, nor results.csv of a sweep, nor folders of runs"),
        (["RUN/begun"], "folder=RUN/begun: metrics.jsonl has no step yet"),
        (["RUN/cut"], "RUN/cut/config.json: cannot be read (Expecting value: line 1 column 12 (char 11))"),
        (["RUN/other"], "RUN/other/config.json: is not the settings of a run"),
        (["RUN/no_jobs"], "folder=RUN/no_jobs: results.csv holds no finished job, and there are no runs"),
        (["RUN/foreign"], "RUN/foreign/results.csv: is not the results of a sweep; it has no column key"),
        (["RUN/short"], "RUN/short/results.csv: line 2 does not have as many values as the header"),
        (["RUN/quotes"], "RUN/quotes/results.csv: cannot be read as CSV (unexpected end of data)"),
        (["RUN", "output=RUN/none/page.html"], "output=RUN/none/page.html: cannot be written (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, run_dir, monkeypatch, capsys):
    (run_dir / "empty").mkdir()
    write_lines(run_dir / "begun" / "metrics.jsonl", [])
    for name, text in (("cut", '{"stages": '), ("other", '{"stages": [{"name": "main"}]}')):
        write_lines(run_dir / name / "metrics.jsonl", [step(1)])
        (run_dir / name / "config.json").write_text(text)
    header = ",".join(COLUMNS)
    damaged = {"no_jobs": "", "foreign": "a,b\n1,2\n", "short": f"{header}\n1,2\n", "quotes": f'{header}\n"' + "1,2\n" * 40_000}
    for name, text in damaged.items():
        (run_dir / name).mkdir()
        (run_dir / name / "results.csv").write_text(text)
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, *(word.replace("RUN", str(run_dir)) for word in arguments))
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {message.replace('RUN', str(run_dir))}\n")


def test_long_lines_are_thinned_to_their_means():
    points = [(float(n), float(n % 2)) for n in range(1001)]
    few = thinned(points)
    assert 300 < len(few) <= 400 and few[0] == (1.0, pytest.approx(1 / 3)) and thinned(points[:400]) == points[:400]
    assert thinned([]) == []


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0001, "0.0001"), (8192, "8.192K"), (2e9, "2G"), (1e18, "1e+18"), (-1500, "-1.5K")]
)
def test_numbers_are_short(value, shown):
    assert short(value) == shown
