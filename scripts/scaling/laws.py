"""Scaling laws L(C) = e + a·C^b: fits that outliers do not pull away, and intervals by bootstrap.

C is in PFLOP/s-days (8.64e19 FLOPs), L in nats a token, b is negative. Fitted is log L, by Huber's loss on its residuals, as Hoffmann et
al. 2022 (arXiv 2203.15556, section 3.3) do. Sizes are few, so intervals are the bootstrap's standard error times Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

PFLOP_S_DAY = 8.64e19
CONFIDENCE = 0.95
_OFFSETS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the lowest loss that a fit with an offset starts from


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(C) = e + a·C^b."""

    a: float
    b: float
    e: float = 0.0

    def __call__(self, compute: np.ndarray | float) -> np.ndarray:
        """Losses at `compute`, in PFLOP/s-days."""
        return self.e + self.a * np.asarray(compute, dtype=float) ** self.b


def num_parameters(offset: bool) -> int:
    """Of a law."""
    return 3 if offset else 2


def fit_law(compute: np.ndarray, loss: np.ndarray, *, offset: bool, huber: float, begin: Law | None = None) -> Law:
    """The law of [points] of compute and loss. `huber`: residual of log L up to which the loss is a square.

    With an offset the best of several fits is taken, or of the one that begins with a law that is near.
    """
    middle = np.log(compute).mean()  # so that height and slope are nearly independent
    x, y, lowest = np.log(compute) - middle, np.log(loss), float(loss.min())

    def residuals(p: np.ndarray) -> np.ndarray:
        power = p[0] + p[1] * x
        return (np.logaddexp(power, p[2]) if offset else power) - y  # p[2] = log(e)

    starts = [begin.e / lowest] if begin else _OFFSETS
    fits = []
    for share in starts if offset else (0.0,):
        slope, height = np.polyfit(x, np.log(loss - min(share, _OFFSETS[-1]) * lowest), 1)
        start = (height, slope, np.log(max(share, _OFFSETS[0] / 10) * lowest)) if offset else (height, slope)
        fits.append(least_squares(residuals, start, loss="huber", f_scale=huber))
    height, slope, *logs = min(fits, key=lambda found: found.cost).x
    return Law(a=float(np.exp(height - slope * middle)), b=float(slope), e=float(np.exp(logs[0])) if offset else 0.0)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and how far it may be off, at `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval(value: float, error: float, freedom: int) -> Interval:
    """By the standard error and the degrees of freedom; without any, the interval is all numbers."""
    reach = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error if freedom > 0 else np.inf
    return Interval(value=value, low=value - reach, high=value + reach)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law, the points it was fitted to, and the laws of its resamples."""

    law: Law
    compute: np.ndarray
    loss: np.ndarray
    resamples: Sequence[Law]
    freedom: int
    """Points beyond parameters."""

    @property
    def residuals(self) -> np.ndarray:
        """log(loss) - log(law) of each point: about its relative error."""
        return np.log(self.loss / self.law(self.compute))

    @property
    def noise(self) -> float:
        """Standard deviation of the residuals, with their loss of freedom made up for; 0 where none is left."""
        return float(np.sqrt((self.residuals**2).sum() / self.freedom)) if self.freedom > 0 else 0.0

    def parameter(self, name: str) -> Interval:
        """`a`, `b` or `e`. a is positive: its interval is one of its logarithm."""
        values = np.array([getattr(law, name) for law in self.resamples])
        if name != "a":
            return interval(getattr(self.law, name), float(values.std(ddof=1)), self.freedom)
        of_log = interval(float(np.log(self.law.a)), float(np.log(values).std(ddof=1)), self.freedom)
        return Interval(value=self.law.a, low=float(np.exp(of_log.low)), high=float(np.exp(of_log.high)))

    def predict(self, compute: float) -> Interval:
        """The loss of one more run, its own noise included."""
        error = np.hypot(np.log([law(compute) for law in self.resamples]).std(ddof=1), self.noise)
        of_log = interval(float(np.log(self.law(compute))), float(error), self.freedom)
        return Interval(value=float(self.law(compute)), low=float(np.exp(of_log.low)), high=float(np.exp(of_log.high)))


def fit(compute: np.ndarray, loss: np.ndarray, *, offset: bool, huber: float, resamples: int, generator: np.random.Generator) -> Fit:
    """The law of [points], and the laws of `resamples` sets of points: the fit, with residuals drawn anew over it.

    Residuals of a fit are smaller than the noise they come from, by sqrt(1 - parameters / points); what is drawn is not.
    """
    law = fit_law(compute, loss, offset=offset, huber=huber)
    freedom = len(loss) - num_parameters(offset)
    fitted, residuals = law(compute), np.log(loss / law(compute))
    residuals = (residuals - residuals.mean()) * np.sqrt(len(loss) / max(1, freedom))
    drawn = generator.choice(residuals, (resamples, len(loss)))
    laws = [fit_law(compute, fitted * np.exp(noise), offset=offset, huber=huber, begin=law) for noise in drawn]
    return Fit(law=law, compute=compute, loss=loss, resamples=laws, freedom=freedom)


def mean(values: Sequence[float]) -> Interval:
    """The mean of values, with Student's interval."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return interval(float(np.mean(values)), error, len(values) - 1)
