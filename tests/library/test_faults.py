# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in what the correction is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

METHODS = {
  "alpha": lambda: optax_svrg.alpha_svrg(0.75),
  "adaptive": lambda: optax_svrg.adaptive_svrg(decay=0.9),
}
methods = pytest.mark.parametrize("method", METHODS)
values = pytest.mark.parametrize("bad", [np.nan, -np.inf, helpers.slow(np.inf)])
jitting = pytest.mark.parametrize("jit", [True, helpers.slow(False)])

PROBLEM = helpers.finite_sum([4] * 5)
PARAMS = {"a": jnp.arange(3.0), "b": jnp.array([[2.0]])}


def spoilt(grads, bad, where):
  """The gradients with a bad first number in one of their arrays."""
  leaves, treedef = jax.tree.flatten(grads)
  leaves[where] = leaves[where].at[(0,) * leaves[where].ndim].set(bad)
  return jax.tree.unflatten(treedef, leaves)


def update_fn(tx, jit):
  def update(grads, state, snapshot_grads):
    return tx.update(grads, state, snapshot_grads=snapshot_grads)

  return jax.jit(update) if jit else update


@methods
@values
@jitting
@pytest.mark.parametrize("where", [0, helpers.slow(1)])
def test_a_bad_mean_makes_inert_until_the_next_good_one(
  method, bad, jit, where
):
  tx = METHODS[method]()
  update = update_fn(tx, jit)
  take = lambda state, fn: optax_svrg.take_snapshot(state, PARAMS, fn)
  good = take(tx.init(PARAMS), PROBLEM.full_grad)
  assert good.is_finite
  state = take(good, lambda p: spoilt(PROBLEM.full_grad(p), bad, where))
  assert not state.is_finite
  assert state.num_snapshots == 2
  point = helpers.perturbed(PARAMS)
  for batch in PROBLEM.batches:
    grads = PROBLEM.grad(point, batch)
    updates, state = update(grads, state, PROBLEM.grad(PARAMS, batch))
    helpers.assert_equal(updates, grads)
    assert state.alpha == 0
  # Nothing is left over from it.
  state = take(state, PROBLEM.full_grad)
  assert state.is_finite
  assert state.num_snapshots == 3
  for batch in PROBLEM.batches:
    grads, s = PROBLEM.grad(point, batch), PROBLEM.grad(PARAMS, batch)
    got, state = update(grads, state, s)
    want, good = update(grads, good, s)
    helpers.assert_equal(got, want)
    assert state.alpha > 0


@methods
def test_a_bad_mean_saves_the_second_gradient(method):
  """Where it is known, i.e. eagerly; under jit, lax.cond does so."""
  tx = METHODS[method]()
  state = helpers.with_snapshot(tx, PARAMS, PROBLEM)
  state = optax_svrg.take_snapshot(
    state, PARAMS, lambda p: spoilt(p, np.nan, 0)
  )

  def grad_fn(params):
    raise AssertionError("not needed")

  updates, _ = tx.update(PARAMS, state, grad_fn=grad_fn)
  helpers.assert_equal(updates, PARAMS)


@methods
@jitting
def test_random_faults_of_the_snapshot_gradient(method, jit):
  """Their steps are plain, and the others as if they had not been."""
  tx = METHODS[method]()
  update = update_fn(tx, jit)
  rng = np.random.default_rng(0)
  state = helpers.with_snapshot(tx, PARAMS, PROBLEM)
  clean = state
  point = PARAMS
  faults = 0
  for step in range(40):
    batch = PROBLEM.batches[step % len(PROBLEM.batches)]
    grads, s = PROBLEM.grad(point, batch), PROBLEM.grad(PARAMS, batch)
    if rng.random() < 0.3:
      bad = rng.choice([np.nan, np.inf, -np.inf])
      updates, state = update(grads, state, spoilt(s, bad, rng.integers(2)))
      helpers.assert_equal(updates, grads)
      faults += 1
    else:
      updates, state = update(grads, state, s)
      want, clean = update(grads, clean, s)
      helpers.assert_equal(updates, want)
    point = jax.tree.map(lambda p, u: p - 0.1 * u, point, updates)
  assert 5 < faults < 20
  assert np.all(np.isfinite(helpers.flat((point, state))))
  helpers.assert_equal(state.estimate, clean.estimate)


@methods
def test_a_bad_gradient_is_not_hidden(method):
  """What to do about it is for optax.apply_if_finite."""
  tx = METHODS[method]()
  state = helpers.with_snapshot(tx, PARAMS, PROBLEM)
  grads = spoilt(PARAMS, np.nan, 0)
  updates, _ = tx.update(grads, state, snapshot_grads=PARAMS)
  np.testing.assert_array_equal(
    np.isnan(helpers.flat(updates)), np.isnan(helpers.flat(grads))
  )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@methods
def test_overflow(method, dtype):
  """All is finite but the result."""
  tx = METHODS[method]()
  most = jnp.full(2, jnp.finfo(dtype).max, dtype)
  state = optax_svrg.take_snapshot(tx.init(most), most, lambda p: -p)
  updates, state = tx.update(-most, state, snapshot_grads=most)
  helpers.assert_equal(updates, -most)
  assert state.is_finite


@pytest.mark.parametrize("source", ["svrg", "saga"])
@pytest.mark.parametrize("rule", ["alpha", "adaptive"])
@jitting
def test_a_step_falls_back_as_a_whole(rule, source, jit):
  """Component by component it would be biased; ``alpha`` says so."""
  large = {"a": jnp.array([6e4, 1.0], jnp.float16), "b": jnp.ones(1)}
  small = {"a": jnp.array([-6e4, 0.5], jnp.float16), "b": jnp.zeros(1)}
  if source == "svrg":
    tx = {
      "alpha": lambda: optax_svrg.alpha_svrg(1.0),
      "adaptive": optax_svrg.adaptive_svrg,
    }[rule]()
    state = optax_svrg.take_snapshot(
      tx.init(large), large, lambda p: jax.tree.map(jnp.zeros_like, p)
    )
    update = lambda g, s: tx.update(g, s, snapshot_grads=small)
  else:
    tx = {
      "alpha": lambda: optax_svrg.alpha_saga(1.0, 2),
      "adaptive": lambda: optax_svrg.adaptive_saga(2, decay=0.0),
    }[rule]()
    state = tx.init(large)
    opposite = jax.tree.map(jnp.negative, small)
    # So often that the coefficient is 1.
    for index, grads in ((0, small), (1, opposite)) * 3:
      _, state = tx.update(grads, state, batch_index=index)
    assert state.alpha == 1
    update = lambda g, s: tx.update(g, s, batch_index=0)
  updates, state = (jax.jit(update) if jit else update)(large, state)
  helpers.assert_equal(updates, large)
  assert state.alpha == 0


@pytest.mark.parametrize("kind", ["adaptive", helpers.slow("alpha")])
@values
@jitting
def test_saga(kind, bad, jit):
  """A bad gradient is passed on, not stored, and the next ones are good."""
  tx = (
    optax_svrg.alpha_saga(0.75, 5)
    if kind == "alpha"
    else optax_svrg.adaptive_saga(5)
  )
  update = lambda g, s, i: tx.update(g, s, batch_index=i)
  update = jax.jit(update) if jit else update
  state = tx.init(PARAMS)
  rng = np.random.default_rng(1)
  faults = 0
  for step in range(30):
    i = step % 5
    grads = PROBLEM.grad(PARAMS, PROBLEM.batches[i])
    if step > 5 and rng.random() < 0.3:
      updates, state = update(spoilt(grads, bad, 0), state, i)
      assert not np.all(np.isfinite(updates["a"]))
      faults += 1
    else:
      updates, state = update(grads, state, i)
      assert np.all(np.isfinite(helpers.flat(updates)))
    assert np.all(np.isfinite(helpers.flat(state)))
  assert 3 < faults < 15


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_adamw_goes_on():
  """The whole training, compiled: a snapshot and every third step are bad."""
  tx = optax.chain(optax_svrg.adaptive_svrg(), optax.adamw(0.1))

  @jax.jit
  def epoch(params, state, batches, mean_factor):
    state = optax_svrg.take_snapshot(
      state,
      params,
      lambda p: optax.tree.scale(mean_factor, PROBLEM.full_grad(p)),
    )
    for step, batch in enumerate(batches):
      factor = np.nan if step % 3 == 1 else 1.0
      snapshot = state[0].snapshot_params
      updates, state = tx.update(
        PROBLEM.grad(params, batch),
        state,
        params,
        snapshot_grads=optax.tree.scale(factor, PROBLEM.grad(snapshot, batch)),
      )
      params = optax.apply_updates(params, updates)
    return params, state

  params, state = PARAMS, tx.init(PARAMS)
  seen = []
  for factor in (1.0, np.inf, 1.0, np.nan, 1.0):
    params, state = epoch(params, state, PROBLEM.batches, factor)
    seen.append(bool(state[0].is_finite))
    assert np.all(np.isfinite(helpers.flat(params)))
  assert seen == [True, False, True, False, True]
