# SPDX-License-Identifier: Apache-2.0
"""What a step costs: the counts, and the benchmark that publishes them."""

import json
import re

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cli
from benchmarks.cost import hlo, step_cost
import optax_svrg

pytestmark = pytest.mark.standard_promotion

SIZE = 100_000
ARRAY_BYTES = 4 * SIZE


@pytest.fixture(scope="module")
def task():
  """An MLP whose step is dominated by its gradient."""
  model = step_cost.mlp(784, 64, 10)
  return step_cost.Problem(model, 256, 3, jnp.float32)


class TestLimit:
  def test_a_gradient(self, task):
    """Three products of matrices, but for the first layer's input."""
    examples, weights = 256, 784 * 64
    got = step_cost.flops(task.lower_gradient())
    products = 4 * examples * weights + 6 * examples * 64 * 10
    assert products <= got <= 1.05 * products

  def test_epochs(self, task):
    plain = step_cost.flops(task.lower_step(step_cost.TRANSFORMS["plain"]))
    gradient = step_cost.flops(task.lower_gradient())
    limits = {
      name: 1 + extra * gradient / plain
      for name, extra in step_cost.EXTRA_GRADIENTS.items()
    }
    for name, want in (
      ("alpha-svrg", 3),
      ("adaptive", 3),
      ("alpha-svrg, table", 2),
      ("alpha-svrg, alpha = 0", 1),
      ("adaptive-saga", 1),
    ):
      assert 0.95 * want <= limits[name] <= want

  @pytest.mark.parametrize(
    "transform",
    [optax_svrg.alpha_svrg(0.75), optax_svrg.adaptive_svrg()],
    ids=["alpha-svrg", "adaptive"],
  )
  def test_a_step_has_one_gradient_more(self, task, transform):
    plain, ours = (
      task.lower_step(t).compile()
      for t in (step_cost.TRANSFORMS["plain"], transform)
    )
    gradient = step_cost.flops(task.lower_gradient())
    more = (
      ours.cost_analysis()["flops"] - plain.cost_analysis()["flops"]
    ) / gradient
    assert 0.95 <= more <= 1.1


@pytest.fixture(scope="module")
def compiled():
  return step_cost.updates_alone(SIZE, jnp.float32)


class TestBytes:
  """Arrays that the compiled update reads and writes in each step.

  The coefficient depends on all of the corrected gradient, which is left out if
  a component is not finite: one sweep over three arrays, which gives the inner
  products too. XLA for CPU then forms the corrected gradient in each of the two
  loops that it makes of AdamW's moments, of three arrays instead of one.
  """

  SWEEP, LOOPS = 3, 2 * 2

  @pytest.mark.parametrize("method", ["alpha-svrg", "adaptive"])
  def test_moves_what_it_needs(self, compiled, method):
    plain, ours = (
      hlo.moved_bytes(compiled[name].as_text()) / ARRAY_BYTES
      for name in ("plain", method)
    )
    assert plain <= ours <= 1.01 * (plain + self.SWEEP + self.LOOPS)

  def test_no_temporary_array(self, compiled):
    for name, program in compiled.items():
      temporary = program.memory_analysis().temp_size_in_bytes
      assert temporary < 0.01 * ARRAY_BYTES, name

  @pytest.mark.parametrize(
    ("transform", "copies"),
    [
      # The second gradient, in whose place the corrected one comes.
      (optax_svrg.alpha_svrg(0.75), 1),
      # Both, as the inner products may be needed once more, in other units.
      (optax_svrg.adaptive_svrg(), 2),
      # Both, and three arrays of the compensated mean.
      (optax_svrg.adaptive_saga(3), 5),
    ],
    ids=["alpha-svrg", "adaptive", "adaptive-saga"],
  )
  def test_gradients_that_a_step_holds(self, task, transform, copies):
    size = sum(x.nbytes for x in jax.tree.leaves(task.params))
    activations = 256 * 64 * 4
    plain, ours = (
      task.lower_step(t).compile().memory_analysis().temp_size_in_bytes
      for t in (step_cost.TRANSFORMS["plain"], transform)
    )
    assert ours - plain <= copies * size + activations


def test_ratios_are_within_rounds():
  times = {"a": [9.0, 2.0, 4.0, 30.0], "b": [1.0, 1.0, 2.0, 10.0]}
  assert step_cost.ratio(times, "a", "b") == 2


def test_programs_take_turns():
  order = []

  def program(name):
    while True:
      order.append(name)
      yield name

  times = step_cost.seconds({n: program(n) for n in "ab"}, rounds=2)
  assert order == list("ababab")
  assert {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_methods_train_alike(task):
  """The table gives what the second gradient gives; off is plain."""
  params = {name: next(program)[0] for name, program in task.programs().items()}
  close = lambda a, b: jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a, b
  )
  close(params["alpha-svrg, table"], params["alpha-svrg"])
  close(params["alpha-svrg, alpha = 0"], params["plain"])
  moved = jax.tree.leaves(
    jax.tree.map(
      lambda a, b: np.abs(a - b).max(), params["plain"], params["alpha-svrg"]
    )
  )
  assert max(moved) > 1e-4


@pytest.mark.slow
class TestCommand:
  def test_tables(self, tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "_SIZE", 1000)
    small = (step_cost.mlp(784, 10), 128)
    monkeypatch.setitem(step_cost.CASES, "mlp-256-batch-128", small)
    result = CliRunner().invoke(
      cli.main,
      [
        *("step-cost", "--cell", "mlp-256-batch-128", "--steps", "2"),
        *("--rounds", "1", "--dtype", "bfloat16"),
        *("--out", str(tmp_path)),
      ],
    )
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "runs.json").read_text())
    table = step_cost.render(results)["table.md"]
    assert table in result.output
    for method in step_cost.EXTRA_GRADIENTS:
      line = rf"\| mlp-256-batch-128 \| {re.escape(method)} \|( \S+ \|){{4}}"
      assert re.search(line, table), method
    for method, moved in step_cost.MUST_MOVE.items():
      assert f"| {method} | {moved} |" in table
    (case,) = results["cases"].values()
    assert [row["method"] for row in case["epochs"]] == list(
      step_cost.EXTRA_GRADIENTS
    )
    assert case["epochs"][0]["time"] == 1
    assert results["dtype"] == "bfloat16"

  @pytest.mark.parametrize(
    ("args", "message"),
    [
      ("--dtype int8", "'--dtype'.*int8"),
      ("--cell mlp", "'--cell'.*mlp"),
      ("--rounds 0", "'--rounds'.*0"),
    ],
  )
  def test_errors(self, args, message):
    result = CliRunner().invoke(cli.main, ["step-cost", *args.split()])
    assert result.exit_code == 2
    assert re.fullmatch(rf"Error: .*{message}.*\n", result.output)
