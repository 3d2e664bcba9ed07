# SPDX-License-Identifier: Apache-2.0
"""Statistics of methods that are compared by seed."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness import comparison


def by_seed(values):
  return dict(enumerate(values))


class TestCompare:
  OURS = (0.9, 1.1, 1.3, 0.8, 1.0)
  THEIRS = (1.0, 1.3, 1.4, 1.0, 1.05)

  def test_numbers_are_those_of_scipy(self):
    got = comparison.compare(by_seed(self.OURS), by_seed(self.THEIRS))
    want = stats.ttest_rel(self.OURS, self.THEIRS)
    scale = np.mean(self.THEIRS)
    interval = want.confidence_interval(0.95)
    assert got.p == pytest.approx(want.pvalue, rel=1e-9)
    assert got.low == pytest.approx(interval.low / scale, rel=1e-9)
    assert got.high == pytest.approx(interval.high / scale, rel=1e-9)
    assert got.difference == pytest.approx(
      np.mean(self.OURS) / scale - 1, rel=1e-9
    )

  def test_pairs_by_seed(self):
    """Whatever the order, and without the seeds that one of the two lacks."""
    ours = {seed: self.OURS[seed] for seed in (4, 2, 0, 3, 1)} | {7: 99.0}
    got = comparison.compare(ours, by_seed((*self.THEIRS, 55.0)))
    want = comparison.compare(by_seed(self.OURS), by_seed(self.THEIRS))
    assert got == want
    assert got.num_seeds == 5

  def test_divergence_has_no_interval(self):
    ours = by_seed((1.0, math.inf, math.nan))
    got = comparison.compare(ours, by_seed((1.0, 1.0, math.inf)))
    assert (got.diverged, got.rival_diverged) == (2, 1)
    assert math.isnan(got.p)
    assert math.isnan(got.low)

  @pytest.mark.parametrize(("change", "p"), [(0.0, 1.0), (-0.25, 0.0)])
  def test_differences_without_spread(self, change, p):
    got = comparison.compare(by_seed([1 + change] * 5), by_seed([1.0] * 5))
    assert (got.low, got.high, got.p) == (change, change, p)


class TestHolm:
  def test_example(self):
    """0.01 · 4, 0.02 · 3, then not less than before."""
    got = comparison.holm([0.02, 0.01, 0.4, 0.025])
    np.testing.assert_allclose(got, [0.06, 0.04, 0.4, 0.06])

  def test_comparisons_without_a_test_do_not_count(self):
    got = comparison.holm([math.nan, 0.03, math.nan])
    np.testing.assert_allclose(got, [math.nan, 0.03, math.nan])

  def test_at_most_one(self):
    assert comparison.holm([0.7, 0.6]) == [1.0, 1.0]


class TestVerdicts:
  @staticmethod
  def comparison(difference, p, num_seeds=6):
    return comparison.Comparison(
      *(num_seeds, 0, 0, difference),
      *(difference - 0.01, difference + 0.01, p),
    )

  def verdict(self, *args, **kwargs):
    return comparison.verdicts({"x": self.comparison(*args, **kwargs)})["x"]

  @pytest.mark.parametrize(
    ("difference", "p", "want"),
    [
      (-0.1, 0.001, "lower, -10.0 % [-11.0, -9.0]"),
      (0.1, 0.001, "higher, +10.0 % [+9.0, +11.0]"),
      (-0.1, 0.051, "no difference found, -10.0 % [-11.0, -9.0]"),
    ],
  )
  def test_texts(self, difference, p, want):
    assert self.verdict(difference, p) == want

  def test_a_difference_counts_after_the_correction(self):
    """One of twenty comparisons is below 5 % by chance."""
    many = {i: self.comparison(-0.1, 0.03 if i else 0.002) for i in range(20)}
    got = comparison.verdicts(many)
    assert got[0].startswith("lower")
    assert all(got[i].startswith("no difference") for i in range(1, 20))
    assert comparison.verdicts({1: many[1]})[1].startswith("lower")

  def test_no_verdict_below_five_seeds(self):
    assert self.verdict(-0.5, 1e-9, 4) == "-50.0 %, 4 seeds, no verdict"
    assert self.verdict(-0.5, 1e-9, 5).startswith("lower")

  @pytest.mark.parametrize(
    ("diverged", "want"),
    [
      ((2, 0), "diverged (2 of 6)"),
      ((0, 1), "rival diverged (1 of 6)"),
      ((6, 6), "both diverged (6 and 6 of 6)"),
    ],
  )
  def test_divergence(self, diverged, want):
    lost = comparison.Comparison(6, *diverged)
    other = self.comparison(-0.1, 0.04)
    got = comparison.verdicts({"lost": lost, "other": other})
    assert got["lost"] == want
    # It is no test that the other one is corrected for.
    assert got["other"].startswith("lower")

  def test_count(self):
    got = comparison.count(
      ["lower, x", "higher, y", "lower, z", "diverged (1 of 6)"]
    )
    assert got == "lower 2, no difference found 0, higher 1, no verdict 1"


class TestLearningRate:
  def test_least_mean_loss(self):
    losses = {0.1: {100: 2.0, 101: 1.0}, 0.3: {100: 1.0, 101: 1.5}}
    assert comparison.best_learning_rate(losses) == 0.3

  def test_a_rate_that_diverges_is_not_chosen(self):
    losses = {0.3: {0: 0.1, 1: math.nan}, 0.1: {0: 2.0, 1: 2.0}}
    assert comparison.best_learning_rate(losses) == 0.1

  def test_where_all_diverge(self):
    losses = {0.3: {0: math.inf}, 0.1: {0: math.inf}}
    assert comparison.best_learning_rate(losses) == 0.1

  def test_tuning_seeds_take_no_part_in_verdicts(self):
    seeds = set(comparison.VERDICT_SEEDS)
    assert not seeds & set(comparison.TUNING_SEEDS)
    assert len(seeds) >= comparison.MIN_SEEDS


class TestOverPlain:
  CURVE = tuple((10 * k, 5 / k**2) for k in (1, 2, 3))

  @pytest.mark.parametrize("gradients", [10, 15, 20, 29, 30])
  def test_power_law(self, gradients):
    loss = 5 * (10 / gradients) ** 2
    got = comparison.over_plain(gradients, 0.8 * loss, self.CURVE)
    assert got == pytest.approx(0.8)

  def test_outside(self):
    """By more than the remainder of an epoch."""
    assert comparison.over_plain(30.5, 1.0, self.CURVE) is not None
    assert comparison.over_plain(33, 1.0, self.CURVE) is None
    assert comparison.over_plain(9, 1.0, self.CURVE) is None


def test_geometric_mean():
  assert comparison.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
  assert comparison.geometric_mean([0.5, math.inf]) == math.inf
