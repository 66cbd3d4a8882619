"""Gaps between arms at one size: right on losses of known difference, on the same rows alone, and with what is missing named."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.registry import compose
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
    assert list(group.losses) == ["full", "moba(512, 3)"] and group.num_rows == NUM_ROWS
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
