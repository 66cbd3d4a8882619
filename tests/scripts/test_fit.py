"""Fits of scaling laws: known ones come back out of noise, intervals hold what they say, and bad results are refused by name."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.registry import compose
from configs.schema import ConfigError, FitConfig
from scripts import fit as program
from scripts.scaling.laws import PFLOP_S_DAY, Law, fit, fit_law, mean
from scripts.scaling.published import published
from scripts.scaling.report import markdown, paper_law
from scripts.scaling.study import ALL, study
from scripts.sweeps.results import COLUMNS

LAWS = {"full": Law(a=2.0, b=-0.070), "moba(512, 3)": Law(a=2.0, b=-0.069)}
SIZES = {"law_1m5": (1.5e6, 3), "law_5m": (5.3e6, 2), "law_13m": (12.9e6, 1), "law_25m": (24.8e6, 1), "law_66m": (65.8e6, 1)}
COMPUTE = np.array([6 * 4 * size**2 / PFLOP_S_DAY for size, seeds in SIZES.values() for _ in range(seeds)])


def rows(*, noise: float, seed: int = 0, context: int = 8192, bucket: int = 2048) -> list[dict[str, str]]:
    """What a sweep would have found if losses went by LAWS, with relative noise; 0.1 nats less in each next range of positions."""
    generator = np.random.default_rng(seed)
    found = []
    for arm, law in LAWS.items():
        for model, (size, seeds) in SIZES.items():
            for number in range(seeds):
                flops = 6 * size * 4 * size
                loss = float(law(flops / PFLOP_S_DAY)) * np.exp(generator.normal(0, noise))
                values = dict.fromkeys(COLUMNS, "0") | {
                    "key": f"{arm}{model}{number}",
                    "job": f"{model}-{number}",
                    "arm": arm,
                    "model": model,
                }
                values |= {"non_embedding": int(size), "tokens": int(4 * size), "seed": number, "context": context, "flops_6nd": int(flops)}
                values |= {"flops_executed": int(2 * flops), "heldout_loss": loss, "device": "none", "git": "abc"}
                values |= {f"loss_from_{low}": loss + 0.15 - 0.1 * index for index, low in enumerate(range(0, context, bucket))}
                found.append({key: str(value) for key, value in values.items()})
    return found


def write(folder: Path, found: list[dict[str, str]]) -> Path:
    with (folder / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return folder / "results.csv"


def config_of(results: Path, *more: str) -> FitConfig:
    return compose(FitConfig, config_name="fit", overrides=[f"results={results}", "resamples=20", *more])


# --- laws -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Law(a=2.6, b=-0.063), Law(a=1.2, b=-0.15, e=1.4)])
def test_a_law_without_noise_comes_back(law):
    found = fit_law(COMPUTE, law(COMPUTE), offset=law.e > 0, huber=0.01)
    assert (found.a, found.b, found.e) == pytest.approx((law.a, law.b, law.e), rel=1e-4)


def test_a_law_with_an_offset_that_has_none_is_one_without():
    law = Law(a=2.0, b=-0.07)
    found = fit_law(COMPUTE, law(COMPUTE), offset=True, huber=0.01)
    assert found(COMPUTE) == pytest.approx(law(COMPUTE), rel=1e-3) and found.e < 0.1


def test_one_bad_run_pulls_a_fit_less_than_least_squares():
    loss = LAWS["full"](COMPUTE)
    loss[-2] *= 1.1
    robust, squares = (fit_law(COMPUTE, loss, offset=False, huber=huber).b for huber in (0.01, 10.0))
    assert abs(robust + 0.07) < 0.4 * abs(squares + 0.07)


def test_intervals_hold_the_exponent_and_the_next_run_as_often_as_they_say():
    """Of 60 noisy sweeps each; at 95 % fewer than 52 would come once in 2000 times."""
    law, trials = Law(a=2.0, b=-0.07), 60
    exponents = heights = foretold = 0
    widths = []
    for seed in range(trials):
        generator = np.random.default_rng(seed)
        loss = law(COMPUTE) * np.exp(generator.normal(0, 0.004, len(COMPUTE)))
        found = fit(COMPUTE[:-1], loss[:-1], offset=False, huber=0.01, resamples=50, generator=generator)
        exponents += law.b in found.parameter("b")
        heights += law.a in found.parameter("a")
        foretold += loss[-1] in found.predict(COMPUTE[-1])
        widths.append(found.parameter("b").high - found.parameter("b").low)
    assert min(exponents, heights, foretold) >= 52
    assert np.median(widths) < 0.01  # and they say something


def test_a_mean_has_students_interval():
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert mean([1.0]).low == -np.inf


# --- studies ----------------------------------------------------------------------------------------------------------------------------


def test_a_study_recovers_both_arms_their_gap_and_the_largest_run(tmp_path):
    found = study(config_of(write(tmp_path, rows(noise=1e-3))))
    assert found.arms == ["full", "moba(512, 3)"] and found.columns == [ALL, *(f"loss_from_{low}" for low in (0, 2048, 4096, 6144))]
    for arm, law in LAWS.items():
        assert law.b in found.fits[arm, ALL].parameter("b") and found.fits[arm, ALL].law.a == pytest.approx(law.a, rel=5e-3)
        assert found.predictions[arm].found in found.predictions[arm].foretold
    (gap,) = found.gaps[ALL]
    assert len(gap.pairs) == len(COMPUTE)
    largest = float(LAWS["full"](COMPUTE[-1]) - LAWS["moba(512, 3)"](COMPUTE[-1]))
    assert largest in gap.at_largest and 0 < gap.at_largest.high - gap.at_largest.low < 0.05
    # Ranges of positions are fitted to their own losses: a constant less loss is a steeper law.
    slopes = [found.fits["full", column].law.b for column in found.columns[1:]]
    assert slopes == sorted(slopes, reverse=True)


def test_the_largest_run_is_foretold_without_it(tmp_path):
    plain = rows(noise=1e-3)
    spoilt = [row | {"heldout_loss": "9"} if row["model"] == "law_66m" else row for row in plain]
    one, other = (study(config_of(write(tmp_path, each), "resamples=5")).predictions["full"] for each in (plain, spoilt))
    assert one.foretold == other.foretold
    assert other.miss == pytest.approx(9 - one.foretold.value) and other.found not in other.foretold


def test_executed_compute_moves_the_law_and_not_its_slope(tmp_path):
    results = write(tmp_path, rows(noise=0))
    plain, executed = (study(config_of(results, f"compute={kind}")).fits["full", ALL].law for kind in ("6nd", "executed"))
    assert executed.b == pytest.approx(plain.b) and executed.a == pytest.approx(plain.a * 2**-plain.b)


def test_the_papers_lines_are_shown_where_axes_agree(tmp_path):
    at_8k = study(config_of(write(tmp_path, rows(noise=1e-3)), "resamples=2"))
    assert paper_law(at_8k, "moba(512, 3)", ALL) == Law(a=2.625, b=-0.063) and paper_law(at_8k, "full", "loss_from_2048") is None
    at_32k = study(config_of(write(tmp_path, rows(noise=1e-3, context=32768)), "resamples=2"))
    assert paper_law(at_32k, "full", "loss_from_30720") == Law(a=1.464, b=-0.097) and paper_law(at_32k, "full", ALL) is None
    executed = study(config_of(tmp_path / "results.csv", "compute=executed", "resamples=2"))
    assert paper_law(executed, "full", "loss_from_30720") is None
    assert published("moba(128, 8)", context=8192, low=None, bucket=2048) is None


def test_the_command_writes_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    results = write(tmp_path, rows(noise=1e-3))
    monkeypatch.setattr(sys, "argv", ["fit", f"results={results}", "resamples=5", f"output_dir={tmp_path / 'out'}"])
    program.main()
    text = (tmp_path / "out" / "fit.md").read_text()
    assert text.strip() in capsys.readouterr().out and (tmp_path / "out" / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert text == markdown(study(config_of(results, "resamples=5", f"output_dir={tmp_path / 'out'}")))
    for part in ("## Laws", "2.625 C^-0.063", "foretold from the smaller", "full − moba(512, 3)", "6,144 to 8,191", "law_66m-0"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda row: row["arm"] == "full", ["arms=['full','moba(512, 3)']"], r"^arms.1=moba\(512, 3\): .* has no such arm; it has full$"),
        (lambda row: row["arm"] == "full" or row["model"] in ("law_1m5", "law_66m"), [],
         r"^results=.*: arm moba\(512, 3\) has runs of 2 sizes, and a fit of L = a·C\^b needs 3; python -m scripts.compare has gaps at one size$"),
        (lambda row: row["model"] not in ("law_1m5", "law_66m"), ["offset=true"], r"^results=.*: arm full has runs of 3 sizes, .* needs 4;"),
        (lambda row: (row["arm"] == "full") == (row["model"] in ("law_5m", "law_13m", "law_25m")), [], r"arm moba.* has runs of 2 sizes"),
    ],
)  # fmt: skip
def test_what_a_fit_lacks_is_named(tmp_path, change, more, message):
    with pytest.raises(ConfigError, match=message):
        study(config_of(write(tmp_path, [row for row in rows(noise=1e-3) if change(row)]), *more))


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^results=.*nowhere.csv: no such file"):
        study(config_of(tmp_path / "nowhere.csv"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"other.csv: is not the results of a sweep; it has no column key$"):
        study(config_of(tmp_path / "other.csv"))
    two = rows(noise=0)[:8] + [row | {"context": "32768"} for row in rows(noise=0)[8:]]
    with pytest.raises(ConfigError, match=r"has runs at contexts of \[8192, 32768\] tokens"):
        study(config_of(write(tmp_path, two)))
    lines = write(tmp_path, rows(noise=0)).read_text().splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(lines[:3]) + lines[3].rpartition(",")[0] + "\n")
    with pytest.raises(ConfigError, match=r"results.csv: line 4 does not have as many values as the header$"):
        study(config_of(tmp_path / "results.csv"))
