# SPDX-License-Identifier: Apache-2.0
"""The grid of problems, and the studies that are built on it."""

import dataclasses
import json
import math

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  coefficient,
  equal_compute,
  grid,
  saga,
  saga_variants,
  stability,
  staleness,
  train,
)
import optax_svrg
from tests import helpers


def runs(losses, lr=0.1):
  """Rows of the form of grid.run_cell."""
  return [
    {"method": method, "lr": lr, "seed": seed, "train_loss": loss}
    for method, values in losses.items()
    for seed, loss in enumerate(values)
  ]


class TestCompare:
  @pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
      ([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], "win"),
      ([2.0, 2.2, 2.1], [1.0, 1.1, 1.2], "loss"),
      ([1.0, 1.4, 0.6], [1.1, 1.1, 1.1], "tie"),
      ([1.0, math.inf, 1.0], [2.0, 2.0, 2.0], "loss"),
      ([2.0, 2.0, 2.0], [1.0, math.inf, 1.0], "win"),
      ([math.inf] * 3, [math.inf] * 3, "tie"),
      # Paired: the seeds differ by more than the methods do.
      ([1.0, 2.0, 3.0], [1.1, 2.11, 3.12], "win"),
    ],
  )
  def test_verdict(self, ours, theirs, verdict):
    got = grid.compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert got.verdict == verdict

  def test_numbers(self):
    got = grid.compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 2.0})
    assert got.relative == pytest.approx(-0.25)
    assert got.deviations == pytest.approx(-0.5 / np.std([-1, 0], ddof=1))


class TestSummary:
  ROWS = (
    *runs(
      {
        "plain": [1.0, 1.1],
        "svrg": [0.9, 1.1],
        "linear 0.5": [0.8, 0.9],
        "linear 0.75": [0.7, 0.8],
        "linear 1": [0.9, 1.0],
        "adaptive": [0.6, 0.7],
      }
    ),
    *runs(
      {
        "plain": [2.0, 2.1],
        "svrg": [3.0, 3.0],
        "linear 0.5": [3.0, 3.0],
        "linear 0.75": [3.0, 3.0],
        "linear 1": [3.0, 3.0],
        "adaptive": [0.3, None],
      },
      lr=0.2,
    ),
  )

  def test_at_the_rate_of_plain(self):
    summary = grid.summarise(self.ROWS, own_lr=False)
    assert {m["lr"] for m in summary["methods"].values()} == {0.1}
    assert summary["best_linear"] == "linear 0.75"
    against = summary["against"]
    assert against["linear"].relative == pytest.approx(0.65 / 0.75 - 1)
    assert against["plain"].relative == pytest.approx(0.65 / 1.05 - 1)

  def test_divergence_is_not_chosen(self):
    summary = grid.summarise(self.ROWS, own_lr=True)
    assert summary["methods"]["adaptive"]["lr"] == 0.1

  def test_close_cells(self):
    rows = runs(
      {
        "plain": [2.0, 2.1, 2.2],
        "svrg": [3.0, 3.1, 3.2],
        **{m: [1.0, 1.1, 1.2] for m in grid.LINEAR},
        "adaptive": [0.5, 0.6, 0.701],
      }
    )
    summary = grid.summarise(rows, own_lr=False)
    assert grid.close_cells({"mlp": summary}) == []
    # 9 % below the linear schedules, which an MLP should be 10 % below.
    rows += runs({m: [0.66, 0.66, 0.66] for m in grid.LINEAR}, lr=0.1)
    summary = grid.summarise(rows, own_lr=False)
    assert grid.close_cells({"mlp": summary}) == ["mlp"]


def test_grid_covers_what_it_claims():
  cells = grid.CELLS.values()
  assert len(cells) >= 18
  for field, values in {
    "dataset": {"mnist-5k", "fashion-mnist"},
    "model": {"logreg", "mlp2", "mlp4"},
    "optimizer": {"sgd", "adamw"},
    "batch_size": {64, 128, 512},
  }.items():
    assert {getattr(cell, field) for cell in cells} == values


def test_grid_of_saga_covers_what_it_claims():
  cells = saga.CELLS.values()
  assert len(cells) >= 24
  for field, values in {
    "dataset": {"mnist-5k", "fashion-mnist"},
    "model": {"mlp2", "mlp4", "vit", "mixer"},
    "optimizer": {"sgd", "momentum", "adamw"},
    "batch_size": {64, 128, 512},
    "epochs": {12, 36},
    "label_noise": {0.0, 0.3},
    "augment": {"none", "shift-flip", "dropout"},
  }.items():
    assert {getattr(cell, field) for cell in cells} == values
  # Cells that follow one another are trained on the same examples.
  assert len(saga.CELLS) == len({tuple(cell) for cell in cells})


# In the form of grid.run_cell.
SAGA_ROWS = [
  row | {"validation_accuracy": 0.5 + row["seed"] / 10}
  for row in runs(
    {
      "plain": [1.0, 1.1, 1.2],
      "plain-fixed": [0.9, 1.0, 1.1],
      "saga": [2.0, None, 2.2],
      "adaptive-saga": [0.8, 0.91, 1.0],
    }
  )
  + runs({"plain-fixed": [3.0, 3.0, 3.0]}, lr=0.2)
]


class TestSagaSummary:
  def test_against_the_better_plain(self):
    summary = saga.summarise(SAGA_ROWS)
    assert summary.better_plain == "plain-fixed"
    assert summary.lrs["plain-fixed"] == 0.1
    differences = [-0.1, -0.09, -0.1]
    assert summary.against_plain.relative == pytest.approx(2.71 / 3.0 - 1)
    assert summary.against_plain.deviations == pytest.approx(
      np.mean(differences) / np.std(differences, ddof=1)
    )
    assert summary.against_plain.verdict == "win"
    assert summary.accuracies["plain"] == pytest.approx(0.6)

  @pytest.mark.parametrize(
    ("relative", "deviations", "want"),
    [
      (-0.2, -5.0, False),
      (-0.2, -2.5, True),
      (0.1, 1.6, True),
      (-0.07, -9.0, True),
      (math.nan, math.nan, False),
    ],
  )
  def test_close(self, relative, deviations, want):
    assert saga.is_close(grid.Comparison(relative, deviations, "")) == want

  def test_state_bytes(self):
    cell = grid.Cell("mnist-5k", "mlp2", "sgd", 64, 4_000, 12)
    cell = saga.Cell(*cell)
    params, state = saga.state_bytes(cell)
    # 63 entries, the mean and its error; scalars and flags besides.
    assert 65 * params <= state < 65 * params + 200


@pytest.mark.standard_promotion
class TestRuns:
  CELL = grid.Cell("mnist-5k", "logreg", "sgd", 512, 4_000, 2)

  def test_only_what_is_missing_is_run(self, tmp_path):
    path = tmp_path / "cell.json"
    methods = {name: grid.METHODS[name] for name in ("plain", "adaptive")}
    first = grid.run_cell(self.CELL, methods, (0.1,), [0], None, path)
    assert [row["method"] for row in first] == ["plain", "adaptive"]
    first[0]["train_loss"] = 123.0
    path.write_text(json.dumps({"runs": first}))
    rows = grid.run_cell(self.CELL, methods, (0.1, 0.2), [0, 1], None, path)
    assert rows[:2] == first
    keys = {(row["method"], row["lr"], row["seed"]) for row in rows}
    assert len(keys) == len(rows) == 8
    assert json.loads(path.read_text())["runs"] == rows
    # The same as with the rate of the compiled program.
    assert grid.losses(rows, "adaptive", 0.2)[0] != first[1]["train_loss"]

  def test_linear_schedules_start_where_they_say(self):
    options = train.Options(*[None] * 14)
    options = dataclasses.replace(options, epochs=3, batch_size=1)
    for name in grid.LINEAR:
      method = grid.METHODS[name](options, 10)
      assert method.coefficient(0) == float(name.split()[1])
      assert method.coefficient(29) == 0

  def test_commands(self, tmp_path, monkeypatch):
    """Whole studies, of a tiny cell."""
    name = self.CELL.name
    monkeypatch.setattr(grid, "CELLS", {name: self.CELL})
    monkeypatch.setattr(staleness, "CELLS", {self.CELL: 0.1})
    monkeypatch.setattr(staleness, "SNAPSHOT_EVERY", (1, 2))
    monkeypatch.setattr(coefficient, "CELLS", {name: 0.1})
    # Not logreg, whose learning rates are not in the table of saga.
    of_saga = saga.Cell("mnist-5k", "mlp2", "sgd", 2_000, 4_000, 4)
    monkeypatch.setattr(saga, "CELLS", {of_saga.name: of_saga})
    monkeypatch.setattr(saga, "ROUNDED_CELLS", (of_saga.name,))
    monkeypatch.setitem(saga.LEARNING_RATES, ("mlp2", "sgd"), (0.1,))
    chosen = ("plain", "svrg", "decay 0.9", "decay 0.9, per leaf")
    monkeypatch.setattr(
      coefficient, "METHODS", {m: coefficient.METHODS[m] for m in chosen}
    )
    monkeypatch.setattr(saga_variants, "CELLS", {of_saga.name: 0.1})
    # Three times the batch is still less than the data.
    smaller = of_saga._replace(batch_size=1_000, epochs=2)
    monkeypatch.setattr(equal_compute, "CELLS", {smaller.name: smaller})
    few = ("plain", "alpha-SVRG, 0.75 linear", "gated", "adaptive SAGA")
    few += (*equal_compute.LONGER, equal_compute.LARGER)
    monkeypatch.setattr(
      equal_compute, "METHODS", {m: equal_compute.METHODS[m] for m in few}
    )
    monkeypatch.setattr(stability, "CELL", self.CELL)
    # The second one fails.
    monkeypatch.setattr(stability, "LEARNING_RATES", (0.1, 1e30))
    args = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    for command, words in (
      (grid.main, ["against plain", "cells with an MLP", name]),
      (staleness.main, ["epochs between snapshots", "adaptive"]),
      (coefficient.main, [*chosen, "all"]),
      (stability.main, ["10 of 10 (", "0 of 10 |"]),
      (saga.main, [of_saga.name, "against the better plain", "bfloat16"]),
      (saga_variants.main, [*saga_variants.METHODS, "all"]),
      (equal_compute.main, [smaller.name, *few, "as many gradients"]),
    ):
      result = CliRunner().invoke(command, args)
      assert result.exit_code == 0, result.output
      for word in words:
        assert word in result.stdout


@pytest.mark.usefixtures("x64")
class TestVariants:
  def test_the_one_that_was_chosen_is_adaptive_svrg(self):
    """The study is of the library's arithmetic."""
    self.agree(coefficient.Variant(0.97), optax_svrg.adaptive_svrg(decay=0.97))

  @pytest.mark.parametrize(
    "change", [{"current": True}, {"per_leaf": True}, {"start": "full"}]
  )
  def test_others_differ(self, change):
    with pytest.raises(AssertionError):
      self.agree(
        coefficient.Variant(0.97, **change),
        optax_svrg.adaptive_svrg(decay=0.97),
      )

  @staticmethod
  def agree(variant, want):
    problem = helpers.finite_sum([3, 4, 1])
    params = {"a": jnp.arange(3.0), "b": jnp.array([2.0])}
    transforms = (coefficient.variant_svrg(variant), want)
    states = [helpers.with_snapshot(tx, params, problem) for tx in transforms]
    point = jax.tree.map(lambda x: 0.7 * x, params)
    for batch in problem.batches:
      grad_fn = lambda p, b=batch: problem.grad(p, b)
      updates = []
      for i, tx in enumerate(transforms):
        u, states[i] = tx.update(
          grad_fn(point), states[i], point, grad_fn=grad_fn
        )
        updates.append(u)
      helpers.assert_close(*updates, rtol=1e-12)


def test_a_variant_that_keeps_its_averages():
  problem = helpers.finite_sum([3, 4, 1])
  params = {"a": jnp.arange(3.0)}
  point = jax.tree.map(lambda x: 0.7 * x, params)
  after = {}
  for start in ("kept", "empty"):
    tx = coefficient.variant_svrg(coefficient.Variant(0.9, start=start))
    state = helpers.with_snapshot(tx, params, problem)
    for _ in range(2):
      for batch in problem.batches:
        grad_fn = lambda p, b=batch: problem.grad(p, b)
        _, state = tx.update(grad_fn(point), state, point, grad_fn=grad_fn)
      state = optax_svrg.take_snapshot(state, point, problem.full_grad)
    grad_fn = lambda p: problem.grad(p, problem.batches[0])
    _, state = tx.update(grad_fn(point), state, point, grad_fn=grad_fn)
    after[start] = float(state.svrg.alpha)
  assert after["empty"] == 1
  assert 0 < after["kept"] < 1


@pytest.mark.standard_promotion
class TestSagaVariants:
  """With gradients that shrink from visit to visit, so that no guard acts."""

  ORDER = (0, 1, 2, 2, 0, 1, 1, 0, 2, 0, 2, 1)

  @property
  def params(self):
    return {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}

  def run(self, tx, order=ORDER):
    """The corrected gradients of the steps, and the states after them."""
    state = tx.init(self.params)
    update = jax.jit(tx.update, static_argnames="batch_grad_fn")
    corrected, states = [], []
    for step, i in enumerate(order):
      updates, state = update(
        self.grads(i, step),
        state,
        self.params,
        batch_index=i,
        batch_grad_fn=self.batch_grad_fn,
      )
      corrected.append(updates)
      states.append(state)
    return corrected, states

  def grads(self, i, step):
    return jax.tree.map(
      lambda g, n: 0.6 ** (step // 3) * (g + 0.1 * n),
      helpers.random_like(self.params, 100 + i),
      helpers.random_like(self.params, step),
    )

  def batch_grad_fn(self, params, i):
    return jax.tree.map(lambda p: jnp.full(p.shape, 1.0 + i), params)

  def variant(self, **kwargs):
    return saga_variants.variant_saga(saga_variants.Variant(**kwargs), 3)

  def test_without_an_addition_is_adaptive_saga(self):
    """The study is of the library's arithmetic."""
    want, _ = self.run(optax_svrg.adaptive_saga(3))
    for guarded in (False, True):
      got, _ = self.run(self.variant(guarded=guarded))
      helpers.assert_close(got, want, rtol=1e-4)

  @pytest.mark.parametrize(
    "change", [{"per_leaf": True}, {"preconditioned": True}, {"share": 0.5}]
  )
  def test_others_differ(self, change):
    want, _ = self.run(optax_svrg.adaptive_saga(3))
    got, _ = self.run(self.variant(**change))
    with pytest.raises(AssertionError):
      helpers.assert_close(got, want, rtol=1e-2)

  def test_a_part_of_a_table_leaves_the_rest_uncorrected(self):
    corrected, states = self.run(self.variant(share=0.5))
    is_kept = helpers.flat(states[-1].is_kept).astype(bool)
    assert is_kept.sum() == 5
    same = helpers.flat(corrected[-1]) == helpers.flat(self.grads(1, 11))
    np.testing.assert_array_equal(same, ~is_kept)

  def test_entries_that_are_computed_anew(self):
    _, states = self.run(self.variant(fills=(1,)), (2, 0, 1, 1))
    before, after = (state.saga.table["b"][:, 0] for state in states[2:])
    helpers.assert_close(before[1], self.grads(1, 2)["b"][0], rtol=1e-6)
    np.testing.assert_array_equal(after[::2], [1, 3])
    helpers.assert_close(after[1], self.grads(1, 3)["b"][0], rtol=1e-6)

  def test_the_oldest_entry_is_refreshed(self):
    _, states = self.run(self.variant(refreshed=1), (2, 1, 1, 1))
    # Refreshed were 0, 1, 0 and 2.
    entries = states[-1].saga.table["b"][:, 0]
    np.testing.assert_array_equal(entries[::2], [1, 3])
    helpers.assert_close(entries[1], self.grads(1, 3)["b"][0], rtol=1e-6)

  def test_equal_gradients(self):
    for name, epochs in {
      "AdamW's metric": 12,
      "warm start": 11,
      "all entries anew, twice": 10,
      "one more entry anew, each step": 6,
    }.items():
      assert saga_variants.VARIANTS[name].epochs(12) == epochs
