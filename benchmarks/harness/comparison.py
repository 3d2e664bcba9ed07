# SPDX-License-Identifier: Apache-2.0
"""Statistics of methods that are compared by seed.

A method and its rival start from the same weights and see the same batches for
the same seed, so their losses are compared seed by seed. A learning rate is
chosen on seeds of its own: chosen on those of the verdict, it would flatter the
method that was tried with more of them.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
import dataclasses
import math
import statistics

import numpy as np
from scipy import special

TUNING_SEEDS = (100, 101)
VERDICT_SEEDS = (0, 1, 2, 3, 4)
MIN_SEEDS = 5
LEVEL = 0.05

Losses = Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A method against a rival, over the seeds that both were run with.

  The difference is the mean of the loss minus the rival's, divided by the
  rival's mean loss, ``low`` and ``high`` the ends of its 95 % t interval, and
  ``p`` is the p-value of the two-sided paired t-test; NaN if a run diverged.
  """

  num_seeds: int
  diverged: int  # Number of runs of the method without a finite loss.
  rival_diverged: int
  difference: float = math.nan
  low: float = math.nan
  high: float = math.nan
  p: float = math.nan


def compare(losses: Losses, rival: Losses) -> Comparison:
  """Compares the losses of a method with those of a rival."""
  seeds = sorted(losses.keys() & rival.keys())
  ours, theirs = ([x[seed] for seed in seeds] for x in (losses, rival))
  diverged = [sum(not math.isfinite(x) for x in xs) for xs in (ours, theirs)]
  n = len(seeds)
  if any(diverged):
    return Comparison(n, *diverged)
  scale = statistics.fmean(theirs) or 1.0  # Absolute if all losses are 0.
  differences = [(a - b) / scale for a, b in zip(ours, theirs, strict=True)]
  mean = statistics.fmean(differences)
  if n < 2:
    return Comparison(n, 0, 0, mean)
  error = statistics.stdev(differences) / math.sqrt(n)
  half = float(special.stdtrit(n - 1, 1 - LEVEL / 2)) * error
  if error:
    p = 2 * float(special.stdtr(n - 1, -abs(mean) / error))
  else:
    p = 0.0 if mean else 1.0
  return Comparison(n, 0, 0, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusts p-values for the number of them, by Holm's method."""
  p = np.array(p_values, float)
  order = p.argsort()  # NaN comes last, and remains.
  factors = np.isfinite(p).sum() - np.arange(len(p))
  p[order] = np.maximum.accumulate(np.minimum(factors * p[order], 1))
  return p.tolist()


def verdicts(comparisons: Mapping[Hashable, Comparison]) -> dict[Hashable, str]:
  """Says what the comparisons of one table show.

  A difference counts if its p-value is below 5 % after Holm's correction over
  all comparisons of the table with enough seeds.
  """
  tested = [k for k, c in comparisons.items() if c.num_seeds >= MIN_SEEDS]
  adjusted = holm([comparisons[k].p for k in tested])
  p_values = dict(zip(tested, adjusted, strict=True))
  return {k: _text(c, p_values.get(k)) for k, c in comparisons.items()}


def _text(comparison: Comparison, p: float | None) -> str:
  c = comparison
  n, difference = c.num_seeds, _percent(c.difference)
  if c.diverged and c.rival_diverged:
    return f"both diverged ({c.diverged} and {c.rival_diverged} of {n})"
  if c.diverged:
    return f"diverged ({c.diverged} of {n})"
  if c.rival_diverged:
    return f"rival diverged ({c.rival_diverged} of {n})"
  if p is None:
    return f"{difference} %, {n} seed{'s' * (n > 1)}, no verdict"
  verdict = "no difference found"
  if p < LEVEL:
    verdict = "lower" if c.difference < 0 else "higher"
  interval = f"[{_percent(c.low)}, {_percent(c.high)}]"
  return f"{verdict}, {difference} % {interval}"


def _percent(x: float) -> str:
  return f"{100 * x:+.1f}"


def count(texts: Sequence[str]) -> str:
  """Counts verdicts, e.g. ``"lower 3, no difference found 5, higher 0"``."""
  kinds = ("lower", "no difference found", "higher")
  counts = {kind: sum(t.startswith(kind) for t in texts) for kind in kinds}
  rest = len(texts) - sum(counts.values())
  counts |= {"no verdict": rest} if rest else {}
  return ", ".join(f"{kind} {number}" for kind, number in counts.items())


def mean(values: Collection[float]) -> float:
  """Mean; infinite unless all values are finite."""
  if not all(map(math.isfinite, values)):
    return math.inf
  return statistics.fmean(values)


def geometric_mean(ratios: Iterable[float]) -> float:
  """Geometric mean; infinite if a ratio is."""
  return math.exp(mean([math.log(ratio) for ratio in ratios]))


def best_learning_rate(losses: Mapping[float, Losses]) -> float:
  """The learning rate of least mean loss; the least one if all diverge."""
  return min(sorted(losses), key=lambda lr: mean(losses[lr].values()))


def over_plain(
  gradients: float, loss: float, curve: Sequence[tuple[float, float]]
) -> float | None:
  """The loss divided by that of plain runs with as many gradients."""
  inside = min(max(gradients, curve[0][0]), curve[-1][0])
  if abs(inside / gradients - 1) > 0.03:
    return None
  x, y = np.log(curve).T
  return loss / math.exp(np.interp(math.log(inside), x, y))
