"""What one arm costs over another where all else is equal: gaps on the same held-out rows, their intervals by paired bootstrap.

Documents are drawn with replacement and bring all their rows, which resemble each other (a cluster bootstrap); rows are drawn where a run
has not kept whose they are. They are the same ones for both arms, so that what makes a row hard for both falls out of the gap. The
interval is of the text: another training differs by its seed too, whose spread is said beside it where there are several.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from configs.schema import CompareConfig, ConfigError
from scripts.scaling.laws import CONFIDENCE, Interval
from scripts.scaling.study import SETTING, Row, read_arms, with_partners, without_partner
from scripts.sweeps.results import ROWS


@dataclass(frozen=True, kw_only=True)
class PairedGap:
    """Loss of the first arm minus another's in nats a token, a mean over seeds: negative where the first is better."""

    arm: str
    seeds: Sequence[str]
    by_seed: Sequence[float]
    whole: Interval
    """Without an interval, all numbers, where a run has kept no rows or one thing alone could be drawn."""
    by_position: Mapping[int, Interval]
    """By the first position of a range; empty where a run has kept no rows."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in arm and seed alone."""

    setting: Mapping[str, str]
    reference: str
    losses: Mapping[str, float]
    """Mean held-out loss of each arm over its seeds, the reference first."""
    gaps: Sequence[PairedGap]
    drawn: str
    """What the bootstrap has drawn: documents, or rows."""
    num_drawn: int
    """How many of them there are among the held-out ones; 0 where a run has kept no rows."""
    drawn_by_position: Mapping[int, int]
    """Those of them that have tokens in a range of positions, by its first."""
    bucket: int
    """Tokens in a range of positions."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a report shows."""

    config: CompareConfig
    groups: Sequence[Group]
    missing: Sequence[str]
    """Runs that one arm has and another lacks, in words."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """The held-out rows of one run: nats and targets [rows, buckets]."""

    bucket: int
    checksums: Sequence[int]
    nats: np.ndarray
    targets: np.ndarray
    documents: Sequence[int]
    """Of each row, the one that most of its tokens are of; empty where the run has not kept them."""


@dataclass(frozen=True, kw_only=True)
class _HeldoutRows:
    """The rows that all runs of a group were evaluated on, and how the bootstrap draws them, the same for all arms and ranges."""

    bucket: int
    targets: np.ndarray
    """[rows, buckets]"""
    are_of_documents: bool
    """Documents are drawn, and bring their rows; otherwise rows."""
    owners: np.ndarray
    """Number of what each row is drawn with [rows]."""
    times: np.ndarray
    """How often each row is drawn [resamples, rows]."""

    @classmethod
    def of(cls, kept: Sequence[_Kept], resamples: int, generator: np.random.Generator) -> "_HeldoutRows":
        """Of runs on the same rows: documents that one has kept are those of all."""
        first = next((run for run in kept if run.documents), kept[0])
        found, owners = np.unique(first.documents or range(len(first.targets)), return_inverse=True)
        times = generator.multinomial(len(found), np.full(len(found), 1 / len(found)), resamples)[:, owners]
        return cls(bucket=first.bucket, targets=first.targets, are_of_documents=bool(first.documents), owners=owners, times=times)

    def ranges(self) -> dict[int, np.ndarray]:
        """Targets [rows] in each range of positions that has some, by its first."""
        return {index * self.bucket: targets for index, targets in enumerate(self.targets.T) if targets.any()}

    def number(self, targets: np.ndarray) -> int:
        """How many things to draw have some of `targets` [rows]."""
        return len(np.unique(self.owners[targets > 0]))

    def interval(self, apart: np.ndarray, targets: np.ndarray) -> Interval:
        """Of nats apart [rows] over `targets` [rows]; without one, all numbers, where a single thing could be drawn."""
        value, low, high = float(apart.sum() / targets.sum()), -np.inf, np.inf
        if self.number(targets) > 1:
            counts = self.times @ targets
            is_some = counts > 0  # a draw without a target, of a range that few rows reach, says nothing
            drawn = (self.times @ apart)[is_some] / counts[is_some]
            low, high = np.quantile(drawn, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
        return Interval(value=value, low=float(low), high=float(high))


def compare(config: CompareConfig) -> Comparison:
    """Compares all that can be. Raises ConfigError where there are not two arms, no two runs differ in nothing else, or held-out rows
    are not the same text."""
    rows = read_arms(config.results, config.arms)
    if len(rows) < 2:
        raise ConfigError(f"results={config.results}: has one arm alone, {next(iter(rows))}, and nothing to compare it with")
    generator = np.random.default_rng(config.seed)
    settings: dict[tuple[str, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for arm, part in rows.items():
        for row in part:
            settings[tuple(row[name] for name in SETTING)][arm].append(row)
    reference = next(iter(rows))
    groups = [_group(config, setting, arms, reference, generator) for setting, arms in settings.items() if reference in arms]
    groups = [group for group in groups if group.gaps]
    if not groups:
        raise ConfigError(f"results={config.results}: no run of {reference} has one of another arm of its {', '.join(SETTING)} and seed")
    return Comparison(config=config, groups=groups, missing=without_partner(rows))


def _group(
    config: CompareConfig, setting: tuple[str, ...], arms: Mapping[str, list[Row]], reference: str, generator: np.random.Generator
) -> Group:
    kept = {row["key"]: found for part in arms.values() for row in part if (found := _kept(config, row))}
    _check_same(config, [row for part in arms.values() for row in part], kept)
    rows = _HeldoutRows.of(list(kept.values()), config.resamples, generator) if kept else None
    gaps = []
    for arm, part in arms.items():
        if arm != reference and (pairs := with_partners(part, arms[reference])):
            gaps.append(_gap(arm, pairs, kept, rows))
    return Group(
        setting=dict(zip(SETTING, setting, strict=True)),
        reference=reference,
        losses={arm: float(np.mean([float(row["heldout_loss"]) for row in part])) for arm, part in arms.items()},
        gaps=gaps,
        drawn="documents" if rows and rows.are_of_documents else "rows",
        num_drawn=rows.number(rows.targets.sum(axis=1)) if rows else 0,
        drawn_by_position={low: rows.number(targets) for low, targets in rows.ranges().items()} if rows else {},
        bucket=rows.bucket if rows else 0,
    )


def _gap(arm: str, pairs: Sequence[tuple[Row, Row]], kept: Mapping[str, _Kept], rows: _HeldoutRows | None) -> PairedGap:
    by_seed = [float(theirs["heldout_loss"]) - float(ours["heldout_loss"]) for ours, theirs in pairs]
    whole = Interval(value=float(np.mean(by_seed)), low=-np.inf, high=np.inf)
    by_position: dict[int, Interval] = {}
    if rows and all(row["key"] in kept for pair in pairs for row in pair):
        apart = np.mean([kept[theirs["key"]].nats - kept[ours["key"]].nats for ours, theirs in pairs], axis=0)
        whole = rows.interval(apart.sum(axis=1), rows.targets.sum(axis=1))
        by_position = {low: rows.interval(apart[:, low // rows.bucket], targets) for low, targets in rows.ranges().items()}
    return PairedGap(arm=arm, seeds=[ours["seed"] for ours, _ in pairs], by_seed=by_seed, whole=whole, by_position=by_position)


def _kept(config: CompareConfig, row: Row) -> _Kept | None:
    if not row[ROWS]:
        return None
    try:
        found = json.loads(row[ROWS])
        kept = _Kept(
            bucket=int(found["position_bucket"]),
            checksums=[int(value) for value in found["checksums"]],
            nats=np.array(found["nats"], dtype=float),
            targets=np.array(found["targets"], dtype=int),
            documents=[int(row[0]) for row in found.get("documents", [])],  # absent from older files
        )
        if kept.nats.ndim != 2 or kept.nats.shape != kept.targets.shape or len(kept.nats) != len(kept.checksums):
            raise ValueError("not a value for each row and bucket")
        if len(kept.documents) not in (0, len(kept.nats)):
            raise ValueError("not a document for each row")
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"results={config.results}: {ROWS} of job {row['job']} is damaged; empty it to do without") from None
    return kept


def _check_same(config: CompareConfig, rows: Sequence[Row], kept: Mapping[str, _Kept]) -> None:
    """Raises ConfigError where two runs were evaluated on other rows than each other."""
    with_rows = [row for row in rows if row["key"] in kept]
    for first, row in itertools.pairwise(with_rows):
        one, other = kept[first["key"]], kept[row["key"]]
        if list(one.checksums) != list(other.checksums) or one.bucket != other.bucket or (one.targets != other.targets).any():
            raise ConfigError(
                f"results={config.results}: jobs {first['job']} and {row['job']} were evaluated on other held-out rows than each other; "
                "train both on one prepared corpus, with the same evaluation.rows and evaluation.position_bucket"
            )
