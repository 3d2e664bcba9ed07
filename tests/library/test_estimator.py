# SPDX-License-Identifier: Apache-2.0
"""The mathematics: unbiasedness, the authors' code, convergence."""

import pathlib
from typing import Any

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

DATA = pathlib.Path(__file__).parents[1] / "data"

shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
trees = st.recursive(
  shapes,
  lambda children: (
    st.lists(children, max_size=3)
    | st.dictionaries(st.sampled_from("abc"), children, max_size=3)
    | st.tuples(children, st.none())
  ),
  max_leaves=5,
)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)
alphas = st.floats(-2, 2)


def is_shape(node: Any) -> bool:
  return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def draw_params(shapes_tree: Any, seed: int) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape)),
    shapes_tree,
    is_leaf=is_shape,
  )


def corrected(alpha, problem, snapshot, params, *, jit=False):
  """The corrected gradient of each batch, and the state."""
  tx = optax_svrg.alpha_svrg(alpha)
  state = helpers.with_snapshot(tx, snapshot, problem)

  def update(params, state, batch):
    grad_fn = lambda p: problem.grad(p, batch)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]

  update = jax.jit(update) if jit else update
  return [update(params, state, b) for b in problem.batches], state


@pytest.mark.usefixtures("x64")
class TestProperties:
  """Over random trees, batch splits and coefficients."""

  @hypothesis.given(trees, sizes, alphas, st.integers(0, 99), st.booleans())
  @hypothesis.settings(max_examples=8)
  def test_unbiased(self, tree, sizes, alpha, seed, jit):
    problem = helpers.finite_sum(sizes, seed)
    snapshot, params = draw_params(tree, seed), draw_params(tree, seed + 1)
    got, _ = corrected(alpha, problem, snapshot, params, jit=jit)
    mean = jax.tree.map(
      lambda *g: sum(n * x for n, x in zip(sizes, g, strict=True)) / sum(sizes),
      *got,
    )
    helpers.assert_close(mean, problem.full_grad(params), rtol=0, atol=1e-12)

  @pytest.mark.slow
  @hypothesis.given(trees, sizes, alphas, st.integers(0, 99))
  def test_linear_in_alpha(self, tree, sizes, alpha, seed):
    problem = helpers.finite_sum(sizes, seed)
    snapshot, params = draw_params(tree, seed), draw_params(tree, seed + 1)
    none, one, some = (
      corrected(a, problem, snapshot, params)[0] for a in (0.0, 1.0, alpha)
    )
    want = jax.tree.map(lambda g, h: g + alpha * (h - g), none, one)
    helpers.assert_close(some, want, rtol=0, atol=1e-12)

  @pytest.mark.slow
  @hypothesis.given(trees, sizes, st.integers(0, 99), st.booleans())
  def test_identity_at_zero(self, tree, sizes, seed, static):
    problem = helpers.finite_sum(sizes, seed)
    snapshot, params = draw_params(tree, seed), draw_params(tree, seed + 1)
    alpha = 0.0 if static else jnp.array(0.0)
    got, _ = corrected(alpha, problem, snapshot, params)
    for updates, batch in zip(got, problem.batches, strict=True):
      helpers.assert_equal(updates, problem.grad(params, batch))

  @pytest.mark.slow
  @hypothesis.given(trees, sizes, st.integers(0, 99))
  def test_exact_at_the_snapshot(self, tree, sizes, seed):
    problem = helpers.finite_sum(sizes, seed)
    params = draw_params(tree, seed)
    got, state = corrected(1.0, problem, params, params)
    for updates in got:
      helpers.assert_close(updates, state.mean_grads, rtol=0, atol=0)

  @pytest.mark.slow
  @hypothesis.given(trees, sizes, st.integers(0, 99))
  def test_variance_vanishes_at_the_snapshot_only(self, tree, sizes, seed):
    """Not a constant: away from the snapshot batches still differ."""
    problem = helpers.finite_sum(sizes, seed)
    snapshot, params = draw_params(tree, seed), draw_params(tree, seed + 1)
    hypothesis.assume(len(sizes) > 1 and jax.tree.leaves(params))
    got, _ = corrected(1.0, problem, snapshot, params)
    first, second = (jax.tree.leaves(u)[0] for u in got[:2])
    assert not np.array_equal(first, second)


@pytest.mark.usefixtures("x64")
@pytest.mark.standard_promotion  # optax.adamw
def test_reproduces_the_authors_code():
  """A run of github.com/davidyyd/alpha-SVRG, weights after each epoch."""
  data = np.load(DATA / "reference_trajectory.npz")
  epochs, steps, _ = data["order"].shape

  def loss(params, batch):
    hidden, labels = batch
    for i in range(0, 6, 2):
      hidden = jax.nn.relu(hidden) if i else hidden
      hidden = hidden @ params[i] + params[i + 1]
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      hidden, labels
    ).mean()

  grad = jax.grad(loss)
  tx = optax.chain(
    optax_svrg.alpha_svrg(optax_svrg.linear_decay(0.75, epochs, steps)),
    optax.adamw(0.01, weight_decay=0.05),
  )

  @jax.jit
  def train_step(params, state, batch):
    grad_fn = lambda p: grad(p, batch)
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state, value

  params = [jnp.asarray(data[f"init_{k}"]) for k in range(6)]
  state = tx.init(params)
  losses, used = [], []
  for epoch in range(epochs):
    batches = [(data["X"][i], data["Y"][i]) for i in data["order"][epoch]]
    state = optax_svrg.take_snapshot(
      state,
      params,
      lambda p, b=batches: optax_svrg.mean_gradient(grad, p, b),
    )
    for batch in batches:
      params, state, value = train_step(params, state, batch)
      losses.append(value)
      used.append(optax.tree.get(state, "alpha"))
    for k, got in enumerate(params):
      np.testing.assert_allclose(
        got, data[f"epoch{epoch}_{k}"], rtol=0, atol=1e-12
      )
  np.testing.assert_allclose(losses, data["losses"], rtol=0, atol=1e-12)
  np.testing.assert_allclose(used, data["alphas"], rtol=0, atol=1e-15)


def least_squares(params, batch):
  x, y = batch
  residual = x @ params - y
  return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(params**2)


def logistic(params, batch):
  x, y = batch
  margins = jnp.where(y > 0, 1.0, -1.0) * (x @ params)
  return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.05 * jnp.sum(params**2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("loss", "learning_rate"),
  [(least_squares, 0.05), helpers.slow(logistic, 0.2)],
)
@pytest.mark.slow
def test_linear_convergence_with_a_constant_step(loss, learning_rate):
  """SVRG and adaptive reach the optimum; at the same step SGD stalls far above.

  So does the linear schedule, which gives the reduction away at the end.
  """
  rng = np.random.default_rng(0)
  num_batches, batch_size, dim, epochs = 20, 10, 10, 300
  x = rng.normal(size=(num_batches, batch_size, dim))
  y = x @ rng.normal(size=dim) + rng.normal(size=(num_batches, batch_size))
  batches = (jnp.asarray(x), jnp.asarray(y))
  everything = tuple(b.reshape(-1, *b.shape[2:]) for b in batches)

  optimum = jnp.zeros(dim)
  for _ in range(50):  # Newton's method
    gradient = jax.grad(loss)(optimum, everything)
    optimum -= jnp.linalg.solve(
      jax.hessian(loss)(optimum, everything), gradient
    )
  assert jnp.max(jnp.abs(jax.grad(loss)(optimum, everything))) < 1e-15

  def distance_after_training(transform):
    tx = optax.chain(transform, optax.sgd(learning_rate))

    def train_step(carry, batch):
      params, state = carry
      grad_fn = lambda p: jax.grad(loss)(p, batch)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
      params, state = carry
      state = optax_svrg.take_snapshot(
        state, params, lambda p: jax.grad(loss)(p, everything)
      )
      order = jax.random.permutation(key, num_batches)
      shuffled = jax.tree.map(lambda b: b[order], batches)
      return jax.lax.scan(train_step, (params, state), shuffled)[0], None

    params = jnp.zeros(dim)
    (params, _), _ = jax.jit(lambda c, k: jax.lax.scan(epoch, c, k))(
      (params, tx.init(params)), jax.random.split(jax.random.key(0), epochs)
    )
    return float(jnp.linalg.norm(params - optimum))

  svrg, plain, linear, adaptive = map(
    distance_after_training,
    (
      optax_svrg.alpha_svrg(1.0),
      optax_svrg.alpha_svrg(0.0),
      optax_svrg.alpha_svrg(optax_svrg.linear_decay(1.0, epochs, num_batches)),
      optax_svrg.adaptive_svrg(),
    ),
  )
  assert svrg < 1e-12
  assert adaptive < 1e-12
  assert plain > 1e6 * svrg
  assert linear > 1e6 * adaptive
