"""What a results file says: a law for each arm and range of positions, the largest size foretold, and what one arm costs over another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.mapping import nearest
from configs.schema import Compute, ConfigError, FitConfig
from scripts.scaling.laws import PFLOP_S_DAY, Fit, Interval, fit, interval, mean, num_parameters
from scripts.sweeps.results import FILE, POSITION, position, read

Row = dict[str, str]
SETTING = ("model", "context", "tokens", "batch_tokens", "lr")
"""Columns that runs have in common to be compared; seeds are compared each with the same."""
ALL = "heldout_loss"
"""The column of the loss over all positions."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The largest runs of an arm, beside what the smaller ones alone say of them."""

    non_embedding: int
    runs: int
    foretold: Interval
    found: float
    """Mean held-out loss of the largest runs."""

    @property
    def miss(self) -> float:
        """Found less foretold, in nats."""
        return self.found - self.foretold.value


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Loss of the first arm minus another's, in nats: negative where the first is better."""

    arm: str
    pairs: Sequence[tuple[int, float]]
    """(parameters without embeddings, gap) of runs that differ in nothing else."""
    mean: Interval
    at_largest: Interval
    """Between the two laws, at the compute of the largest run that both have."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a report shows. Keys are an arm, or an arm and a column of losses."""

    config: FitConfig
    rows: dict[str, list[Row]]
    context: int
    columns: Sequence[str]
    """`ALL`, and those of the ranges of positions."""
    fits: dict[tuple[str, str], Fit]
    predictions: dict[str, Prediction]
    gaps: dict[str, list[Gap]]
    """By column."""

    @property
    def arms(self) -> list[str]:
        return list(self.rows)

    @property
    def bucket(self) -> int:
        """Tokens in a range of positions; the whole row where there is one range."""
        return position(self.columns[2]) if len(self.columns) > 2 else self.context


def study(config: FitConfig) -> Study:
    """Fits all that the results hold. Raises ConfigError where an arm is missing or has too few points, saying which."""
    rows = _arms(config)
    contexts = sorted({int(row["context"]) for part in rows.values() for row in part})
    if len(contexts) > 1:
        raise ConfigError(f"results={config.results}: has runs at contexts of {contexts} tokens; a law is of one, so leave the others out")
    first = next(iter(rows.values()))
    ranges = sorted((name for name in first[0] if name.startswith(POSITION)), key=position)
    columns = [ALL, *(name for name in ranges if all(row[name] for part in rows.values() for row in part))]
    generator = np.random.default_rng(config.seed)
    predictions = {arm: found for arm, part in rows.items() if (found := _predict(config, part, generator))}  # before all are looked at
    fits = {(arm, column): _fit(config, part, column, generator) for arm, part in rows.items() for column in columns}
    reference, *others = rows
    gaps = {column: [_gap(config, rows, fits, column, reference, arm) for arm in others] for column in columns}
    return Study(config=config, rows=rows, context=contexts[0], columns=columns, fits=fits, predictions=predictions, gaps=gaps)


def compute_of(config: FitConfig, row: Row) -> float:
    """PFLOP/s-days of a run."""
    return float(row["flops_6nd" if config.compute is Compute.SIX_ND else "flops_executed"]) / PFLOP_S_DAY


def read_arms(results: str, arms: Sequence[str]) -> dict[str, list[Row]]:
    """The runs of each arm by compute, of those that are named or of all, full first.

    Raises ConfigError for a file that is none or holds no such arm."""
    path = Path(results)
    if path.is_dir():
        raise ConfigError(f"results={results}: is a folder; name its file, results={path / FILE}")
    if not path.is_file():
        raise ConfigError(f"results={results}: no such file; python -m scripts.sweep writes results.csv into its sweep_dir")
    rows = read(path)
    if not rows:
        raise ConfigError(f"results={results}: holds no finished job")
    present = sorted({row["arm"] for row in rows}, key=lambda arm: (arm != "full", arm))
    for index, arm in enumerate(arms):
        if arm not in present:
            raise ConfigError(f"arms.{index}={arm}: {results} has no such arm{nearest(arm, present)}; it has {'; '.join(present)}")
    return {arm: sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["flops_6nd"])) for arm in arms or present}


def with_partners(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Those of `rows` that one of another arm's is alike in all else, each with it."""
    partners = {_pair_key(row): row for row in others}
    return [(row, partners[_pair_key(row)]) for row in rows if _pair_key(row) in partners]


def without_partner(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """The runs that one arm has and another lacks, in words: `moba(512, 3) lacks law_66m, 263,061,504 tokens, seed 0`."""
    all_keys = {_pair_key(row): row for part in rows.values() for row in part}
    found = []
    for arm, part in rows.items():
        own = {_pair_key(row) for row in part}
        lacking = [row for key, row in all_keys.items() if key not in own]
        found += [f"{arm} lacks {row['model']}, {int(row['tokens']):,} tokens, lr {row['lr']}, seed {row['seed']}" for row in lacking]
    return found


def _arms(config: FitConfig) -> dict[str, list[Row]]:
    chosen = read_arms(config.results, config.arms)
    needed = num_parameters(config.offset) + 1
    for arm, part in chosen.items():
        sizes = len({row["flops_6nd"] for row in part})
        if sizes < needed:
            law = "L = e + a·C^b" if config.offset else "L = a·C^b"
            raise ConfigError(
                f"results={config.results}: arm {arm} has runs of {sizes} sizes, and a fit of {law} needs {needed}; "
                "python -m scripts.compare has gaps at one size"
            )
    return chosen


def _fit(config: FitConfig, rows: Sequence[Row], column: str, generator: np.random.Generator) -> Fit:
    return fit(
        np.array([compute_of(config, row) for row in rows]),
        np.array([float(row[column]) for row in rows]),
        offset=config.offset,
        huber=config.huber,
        resamples=config.resamples,
        generator=generator,
    )


def _predict(config: FitConfig, rows: Sequence[Row], generator: np.random.Generator) -> Prediction | None:
    """None where the smaller runs are too few for a law with an interval."""
    largest = max(int(row["flops_6nd"]) for row in rows)
    smaller, held = ([row for row in rows if (int(row["flops_6nd"]) == largest) is is_held] for is_held in (False, True))
    if len({row["flops_6nd"] for row in smaller}) < num_parameters(config.offset) + 1:
        return None
    foretold = _fit(config, smaller, ALL, generator).predict(compute_of(config, held[0]))
    found = float(np.mean([float(row[ALL]) for row in held]))
    return Prediction(non_embedding=int(held[0]["non_embedding"]), runs=len(held), foretold=foretold, found=found)


def _gap(config: FitConfig, rows: dict[str, list[Row]], fits: dict[tuple[str, str], Fit], column: str, reference: str, arm: str) -> Gap:
    paired = with_partners(rows[arm], rows[reference])
    if not paired:
        raise ConfigError(
            f"results={config.results}: no run of {arm} has a run of {reference} of its size, tokens and seed to be compared with"
        )
    pairs = [(int(mine["non_embedding"]), float(theirs[column]) - float(mine[column])) for mine, theirs in paired]
    ours, other = fits[reference, column], fits[arm, column]
    ours_at, other_at = (compute_of(config, row) for row in reversed(paired[-1]))
    error = np.hypot(*(np.std([law(at) for law in each.resamples], ddof=1) for each, at in ((ours, ours_at), (other, other_at))))
    value = float(ours.law(ours_at) - other.law(other_at))
    largest = interval(value, float(error), ours.freedom + other.freedom)
    return Gap(arm=arm, pairs=pairs, mean=mean([gap for _, gap in pairs]), at_largest=largest)


def _pair_key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in (*SETTING, "seed"))
