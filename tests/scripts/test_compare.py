"""Gaps between arms at one size: right on losses of known difference, on the same rows alone, and with what is missing named."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.registry import REPOSITORY, compose
from configs.schema import CompareConfig, ConfigError
from scripts import compare as program
from scripts.scaling.comparison import Comparison, compare
from scripts.sweeps.results import COLUMNS
from tests.scripts.test_fit import write

BUCKET, NUM_ROWS = 2048, 32
GAP = np.array([0.0, -0.01])  # full − moba by range of positions: MoBA loses in the second alone


def rows(*, seeds: int = 1, noise: float = 0.004, trial: int = 0) -> list[dict[str, str]]:
    """Two arms on the same rows, hard ones and easy ones (0.3 nats apart), whose gaps scatter by `noise`."""
    generator = np.random.default_rng(trial)
    hardness = generator.normal(1.5, 0.3, (NUM_ROWS, 1))
    targets = np.full((NUM_ROWS, 2), BUCKET)
    targets[::3, 1] = 700
    found = []
    for arm in ("full", "moba(512, 3)"):
        for seed in range(seeds):
            loss = hardness + 0.002 * seed - (arm != "full") * (GAP + generator.normal(0, noise, (NUM_ROWS, 2)))
            nats = loss * targets
            kept = {"step": 9, "position_bucket": BUCKET, "checksums": list(range(NUM_ROWS)), "targets": targets.tolist()}
            values = dict.fromkeys(COLUMNS, "0") | {"key": f"{arm}{seed}", "job": f"{arm}-{seed}", "arm": arm, "model": "law_13m"}
            values |= {"seed": str(seed), "context": "4096", "flops_6nd": "9", "heldout_loss": str(nats.sum() / targets.sum())}
            found.append(values | {"heldout_rows": json.dumps(kept | {"nats": nats.tolist()})})
    return found


def compared(folder: Path, found: list[dict[str, str]], *more: str) -> Comparison:
    return compare(compose(CompareConfig, config_name="compare", overrides=[f"results={write(folder, found)}", "resamples=400", *more]))


def copies(low: float, high: float) -> list[dict[str, str]]:
    """Two documents, the second twice as long, whose rows are copies of each other: full − MoBA is `low` in all of one, `high` in the
    other, which alone reaches the second range of positions."""
    of_long = np.arange(NUM_ROWS) % 2 == 1
    targets = np.stack([np.full(NUM_ROWS, 100), 100 * of_long], axis=1)
    documents = [[5, 2, 9] if is_long else [2, 5] for is_long in of_long]  # a few tokens of others are in each
    found = []
    for values, gap in zip(rows(), (0, np.where(of_long, high, low)[:, None]), strict=True):
        nats = (2 - gap) * targets
        kept = {"step": 9, "position_bucket": BUCKET, "checksums": list(range(NUM_ROWS)), "documents": documents}
        kept |= {"targets": targets.tolist(), "nats": nats.tolist()}
        found.append(values | {"heldout_loss": str(nats.sum() / targets.sum()), "heldout_rows": json.dumps(kept)})
    return found


def without_documents(row: dict[str, str]) -> dict[str, str]:
    kept = json.loads(row["heldout_rows"])
    del kept["documents"]
    return row | {"heldout_rows": json.dumps(kept)}


def test_documents_are_drawn_with_all_their_rows(tmp_path):
    """Of two documents both draws are of one in a quarter of cases, so that 95 % reach from the one's gap to the other's. Of 32 rows
    instead, 10 or 11 to 21 or 22 are of the long one, which counts twice: there the binomial's tails pass 2.5 %."""
    low, high, found = -0.03, 0.01, copies(-0.03, 0.01)
    (group,) = compared(tmp_path, found).groups
    (gap,) = group.gaps
    assert (group.drawn, group.num_drawn, group.drawn_by_position) == ("documents", 2, {0: 2, BUCKET: 1})
    assert (gap.whole.low, gap.whole.value, gap.whole.high) == pytest.approx((low, (low + 2 * high) / 3, high), abs=1e-12)
    assert gap.by_position[0].low == pytest.approx(low) and gap.by_position[0].high == pytest.approx(high)
    alone = gap.by_position[BUCKET]
    assert alone.value == pytest.approx(high) and (alone.low, alone.high) == (-np.inf, np.inf)  # nothing says how another would be
    (of_rows,) = compared(tmp_path, [without_documents(row) for row in found], "resamples=20000").groups
    assert (of_rows.drawn, of_rows.num_drawn) == ("rows", NUM_ROWS)
    at = {long: low + (high - low) * 2 * long / (NUM_ROWS + long) for long in (10, 11, 21, 22)}
    whole = of_rows.gaps[0].whole
    assert at[10] - 1e-9 < whole.low < at[11] + 1e-9 and at[21] - 1e-9 < whole.high < at[22] + 1e-9 and whole.value == gap.whole.value
    assert compared(tmp_path, [found[0], without_documents(found[1])]).groups[0].gaps[0] == gap  # the rows are the same text


def test_the_report_says_what_was_drawn_and_how_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", str(write(tmp_path, copies(-0.03, 0.01))), "resamples=100"])
    program.main()
    text = capsys.readouterr().out
    assert "interval over 2 held-out documents |" in text and "| positions      | documents |" in text
    assert re.search(r"\| 2,048 to 4,095 +\| +1 \| +\+0.0100 \(none\) \|", text)


@pytest.mark.parametrize(("name", "num_documents"), [("granularity", 5), ("granularity/second", 5), ("scaling_law_small", 7)])
def test_results_of_the_pages_have_intervals_over_documents(name, num_documents):
    results = f"results={REPOSITORY}/docs/results/{name}/results.csv"
    found = compare(compose(CompareConfig, config_name="compare", overrides=[results, "resamples=100"]))
    assert {(group.drawn, group.num_drawn) for group in found.groups} == {("documents", num_documents)}
    assert all(np.isfinite(gap.whole.low) for group in found.groups for gap in group.gaps)


def test_intervals_hold_the_gap_as_often_as_they_say(tmp_path):
    """Of 60 pairs of runs at 95 %, fewer than 50 would come once in 1000 times; and what makes rows hard for both is not in them."""
    hits, widths = 0, []
    for trial in range(60):
        (gap,) = compared(tmp_path, rows(trial=trial)).groups[0].gaps
        hits += GAP[1] in gap.by_position[BUCKET]
        widths.append(gap.by_position[BUCKET].high - gap.by_position[BUCKET].low)
    assert hits >= 50
    assert np.median(widths) < 0.005  # unpaired it would be 0.3


def test_seeds_are_averaged_and_their_spread_is_said(tmp_path):
    (group,) = compared(tmp_path, rows(seeds=3)).groups
    (gap,) = group.gaps
    assert list(gap.seeds) == ["0", "1", "2"] and gap.whole.value == pytest.approx(np.mean(gap.by_seed)) and gap.whole.low < gap.whole.value
    assert list(group.losses) == ["full", "moba(512, 3)"] and (group.drawn, group.num_drawn) == ("rows", NUM_ROWS)
    assert gap.by_position[0].value == pytest.approx(0, abs=2e-3) and gap.by_position[BUCKET].high < 0


def test_the_command_writes_a_table_and_a_figure_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    results = write(tmp_path, rows(seeds=2)[:3])
    monkeypatch.setattr(sys, "argv", ["compare", str(results), "resamples=100"])
    program.main()
    text = (tmp_path / "compare.md").read_text()
    assert text.strip() in capsys.readouterr().out and (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "Missing: moba(512, 3) lacks law_13m, 0 tokens, lr 0, seed 1." in text and "2,048 to 4,095" in text
    assert f"interval over {NUM_ROWS} held-out rows |" in text and re.search(rf"\| 2,048 to 4,095 +\| +{NUM_ROWS} \|", text)


def test_results_without_rows_have_gaps_without_intervals(tmp_path):
    old = [{key: value for key, value in row.items() if key != "heldout_rows"} for row in rows()]
    (gap,) = compared(tmp_path, old).groups[0].gaps
    assert gap.whole.value == pytest.approx(-0.004, abs=0.003) and gap.whole.low == -np.inf and not gap.by_position


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_rows": lambda text: text.replace("[0, 1,", "[1, 0,")}, r"jobs full-0 and moba\(512, 3\)-0 were evaluated on other held-out"),
        ({"heldout_rows": lambda text: text[:50]}, r"heldout_rows of job moba\(512, 3\)-0 is damaged; empty it"),
        ({"heldout_rows": lambda text: text.replace('"targets"', '"documents": [[0]], "targets"')}, r"heldout_rows of .* is damaged"),
        ({"heldout_rows": lambda text: text.replace('"targets"', '"documents": [[]], "targets"')}, r"heldout_rows of .* is damaged"),
        ({"arm": lambda text: "full", "key": lambda text: "other"}, r"has one arm alone, full, and nothing to compare it with$"),
        ({"lr": lambda text: "1"}, r"no run of full has one of another arm of its model, context, tokens, batch_tokens, lr and seed$"),
        ({"lr": lambda text: "fast"}, r"results.csv: line 3 has 'fast' in the column lr, which is of numbers$"),
        ({"heldout_loss": lambda text: ""}, r"line 3 has '' in the column heldout_loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, change, message):
    first, second = rows()
    with pytest.raises(ConfigError, match=message):
        compared(tmp_path, [first, second | {key: to(second[key]) for key, to in change.items()}])


def test_a_folder_is_told_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^results=(.*): is a folder; name its file, results=\1/results.csv$"):
        compare(compose(CompareConfig, config_name="compare", overrides=[f"results={tmp_path}"]))


def test_a_job_that_joined_results_have_twice_counts_once(tmp_path):
    first, second = rows()
    (group,) = compared(tmp_path, [first, second, first | {"heldout_loss": "9"}]).groups
    assert group.losses["full"] == 9
