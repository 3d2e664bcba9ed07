# SPDX-License-Identifier: Apache-2.0
"""What a state tells for logging, and the warning of a missing snapshot."""

from typing import Any
import warnings

from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg

# Optax's optimizers and Flax rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

# Named as the fields of the states.
PARAMS = {"alpha": jnp.ones(2), "count": jnp.zeros(()), "estimate": jnp.ones(1)}
SVRG_KEYS = ["method", "steps", "alpha", "num_snapshots", "is_finite"]
SAGA_KEYS = ["method", "steps", "alpha", "num_filled", "num_batches"]


def grad_fn(params: Any) -> Any:
  return jax.tree.map(lambda p: 2 * p, params)


def step(tx: Any, state: Any, index: int = 0) -> Any:
  extra = {"grad_fn": grad_fn, "batch_index": index}
  return tx.update(grad_fn(PARAMS), state, PARAMS, **extra)[1]


def mean_grad(params: Any) -> Any:
  return jax.tree.map(lambda p: 1.5 * p, params)


WRAPPERS = {
  "bare": lambda tx: tx,
  "chain": lambda tx: optax.chain(optax.chain(tx), optax.adam(0.1)),
  "MultiSteps": lambda tx: optax.chain(
    tx, optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
  ),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "inject_hyperparams": lambda tx: optax.chain(
    tx, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
  ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_svrg_in_any_nesting(name):
  tx = WRAPPERS[name](optax_svrg.alpha_svrg(0.75))
  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  state = step(tx, step(tx, state))
  summary = optax_svrg.summary(state)
  assert list(summary) == SVRG_KEYS
  want = ["alpha_svrg", 2, 0.75, 1, True]
  assert list(summary.values()) == want
  assert [type(v) for v in summary.values()] == [type(v) for v in want]


@pytest.mark.parametrize("name", WRAPPERS)
def test_saga_in_any_nesting(name):
  tx = WRAPPERS[name](optax_svrg.alpha_saga(0.75, 4))
  state = step(tx, step(tx, step(tx, tx.init(PARAMS)), 2), 2)
  summary = optax_svrg.summary(state)
  assert list(summary) == SAGA_KEYS
  assert list(summary.values()) == ["alpha_saga", 3, 0.75, 2, 4]


def test_of_the_adaptive_methods():
  svrg = optax_svrg.adaptive_svrg(max_alpha=0.25)
  state = optax_svrg.take_snapshot(svrg.init(PARAMS), PARAMS, mean_grad)
  summary = optax_svrg.summary(step(svrg, state))
  assert summary["method"] == "adaptive_svrg"
  assert summary["alpha"] == 0.25
  assert isinstance(summary["variance_ratio"], float)
  saga = optax_svrg.adaptive_saga(4)
  summary = optax_svrg.summary(step(saga, saga.init(PARAMS)))
  assert summary["method"] == "adaptive_saga"
  assert summary["variance_ratio"] == 1


class Model(nnx.Module):
  """With a parameter named as a field of the state."""

  def __init__(self) -> None:
    self.alpha = nnx.Param(jnp.ones(2))


def test_in_an_nnx_optimizer():
  model = Model()
  tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  optax_svrg.flax.take_snapshot(optimizer, model, mean_grad)
  params = nnx.state(model, nnx.Param)
  optimizer.update(model, grad_fn(params), grad_fn=grad_fn)
  assert optax_svrg.summary(optimizer)["alpha"] == 0.5
  assert optax_svrg.summary(optimizer.opt_state)["num_snapshots"] == 1


@pytest.mark.parametrize(
  "make", [train_state.TrainState, optax_svrg.flax.TrainState]
)
def test_in_a_linen_train_state(make):
  tx = optax.chain(optax_svrg.adaptive_saga(4), optax.sgd(0.1))
  state = make.create(apply_fn=None, params=PARAMS, tx=tx)
  summary = optax_svrg.summary(state)
  assert (summary["method"], summary["num_filled"]) == ("adaptive_saga", 0)


def test_of_several_states():
  labels = {"alpha": "svrg", "count": "saga", "estimate": "saga"}
  tx = optax.partition(
    {"svrg": optax_svrg.alpha_svrg(0.5), "saga": optax_svrg.alpha_saga(1.0, 2)},
    labels,
  )
  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  summary = optax_svrg.summary(state)
  methods = {k: v for k, v in summary.items() if k.endswith("/method")}
  assert set(methods.values()) == {"alpha_svrg", "alpha_saga"}
  for key, method in methods.items():
    assert method.split("_")[1] in key
  assert len(summary) == len(SVRG_KEYS) + len(SAGA_KEYS)


def test_of_a_stacked_state():
  """What is alike is a number, what differs a list."""
  tx = optax_svrg.alpha_svrg(0.5)
  stacked = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
  state = jax.vmap(tx.init)(stacked)
  bad = lambda p: jax.tree.map(lambda x: x.at[1].set(jnp.nan), p)
  state = optax_svrg.take_snapshot(state, stacked, bad)
  summary = optax_svrg.summary(state)
  assert summary["is_finite"] == [True, False]
  assert summary["num_snapshots"] == 1


def test_refuses():
  tx = optax_svrg.alpha_svrg(0.5)
  with pytest.raises(ValueError, match="opt_state holds no state of optax_s"):
    optax_svrg.summary(optax.adam(0.1).init(PARAMS))
  with pytest.raises(
    TypeError, match=r"is traced: call .* outside of jax\.jit"
  ):
    jax.jit(lambda s: optax_svrg.summary(s)["alpha"])(tx.init(PARAMS))


class TestWarning:
  """Forgetting take_snapshot is visible, once and where it costs nothing."""

  @pytest.mark.parametrize(
    "make", [lambda: optax_svrg.alpha_svrg(0.5), optax_svrg.adaptive_svrg]
  )
  def test_of_eager_updates_once(self, make):
    tx = make()
    with pytest.warns(UserWarning, match=r"no snapshot .*take_snapshot") as got:
      state = step(tx, step(tx, tx.init(PARAMS)))
    assert len(got) == 1
    assert got[0].filename == __file__
    assert state.count == 2

  def test_of_summary(self):
    tx = optax_svrg.alpha_svrg(0.5)
    state = jax.jit(lambda s: step(tx, s))(tx.init(PARAMS))
    with pytest.warns(UserWarning, match="1 updates without a snapshot"):
      optax_svrg.summary(state)

  @pytest.mark.parametrize("case", ["jit", "zero", "snapshot", "start"])
  def test_of_nothing_else(self, case):
    tx = optax_svrg.alpha_svrg(lambda _: 0.0 if case == "zero" else 0.5)
    state = tx.init(PARAMS)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      if case == "snapshot":
        state = optax_svrg.take_snapshot(state, PARAMS, mean_grad)
      if case == "start":
        optax_svrg.summary(state)
      elif case == "jit":
        state = jax.jit(lambda s: step(tx, s))(state)
      else:
        state = step(tx, state)
    assert state.count == (case != "start")


def test_numbers_are_those_of_the_state():
  tx = optax_svrg.adaptive_svrg(decay=0.5)
  params = {"w": jnp.zeros(2)}
  state = optax_svrg.take_snapshot(
    tx.init(params), params, lambda p: {"w": jnp.zeros(2)}
  )
  g, s = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([2.0, 0.0])}
  for _ in range(2):
    _, state = tx.update(g, state, snapshot_grads=s)
  summary = optax_svrg.summary(state)
  assert summary["alpha"] == 0.5
  np.testing.assert_allclose(
    summary["variance_ratio"], float(state.estimate.variance_ratio)
  )
