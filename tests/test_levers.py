# SPDX-License-Identifier: Apache-2.0
"""The ways to make SVRG cheaper that benchmarks compare."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import equal_compute, levers
import optax_svrg

pytestmark = pytest.mark.standard_promotion

STEPS, SIZE = 16, 4
EPOCHS = 8
X = np.random.default_rng(0).normal(size=(STEPS * SIZE, 5))
Y = np.sign(X @ np.arange(5.0) + np.random.default_rng(1).normal(size=len(X)))


def loss(params, rows):
  x, y = jnp.asarray(X)[rows], jnp.asarray(Y)[rows]
  margins = y * (x @ params["w"] + params["b"])
  ridge = 0.05 * (params["w"] @ params["w"] + params["b"] ** 2)
  return jnp.mean(jnp.log1p(jnp.exp(-margins))) + ridge


grad = jax.grad(loss)


def orders(epochs):
  keys = jax.random.split(jax.random.key(0), epochs)
  draw = lambda key: jax.random.permutation(key, len(X)).reshape(STEPS, SIZE)
  return jax.vmap(draw)(keys)


def train(transform, epochs=EPOCHS, lr=0.3):
  """Parameters after each epoch, and the last state."""
  transform = optax.with_extra_args_support(transform)
  tx = optax.chain(transform, optax.sgd(lr))

  def epoch(carry, order):
    def step(carry, i):
      params, state = carry
      updates, state = tx.update(
        grad(params, order[i]),
        state,
        params,
        grad_fn=lambda p: grad(p, order[i]),
        batch_index=i,
        batch_grad_fn=lambda p, i: grad(p, order[i]),
      )
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, carry, jnp.arange(STEPS))
    return carry, carry[0]

  params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
  (_, state), history = jax.jit(lambda c, o: jax.lax.scan(epoch, c, o))(
    (params, tx.init(params)), orders(epochs)
  )
  return history, state[0]


def pull(name, epochs=EPOCHS, lr=0.3):
  lever = levers.LEVERS[name]
  return train(levers.pull(lever, STEPS, epochs), epochs, lr)


def final_norm(history):
  """Of the full gradient after the last epoch."""
  params = jax.tree.map(lambda x: x[-1], history)
  return float(optax.tree.norm(grad(params, np.arange(len(X)))))


@pytest.mark.usefixtures("x64")
class TestLevers:
  def test_a_full_pass_is_the_library_as_users_call_it(self):
    got, _ = pull("adaptive SVRG")
    tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.3))
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    state = tx.init(params)

    @jax.jit
    def step(params, state, rows):
      grad_fn = lambda p: grad(p, rows)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      return optax.apply_updates(params, updates), state

    for epoch, order in enumerate(orders(EPOCHS)):
      state = optax_svrg.take_snapshot(
        state, params, lambda p, o=order: optax_svrg.mean_gradient(grad, p, o)
      )
      for rows in order:
        params, state = step(params, state, rows)
      np.testing.assert_allclose(params["w"], got["w"][epoch], rtol=1e-12)

  def test_a_table_changes_nothing(self):
    for got, want in zip(
      *(pull(name)[0].values() for name in ("gradient table", "adaptive SVRG")),
      strict=True,
    ):
      np.testing.assert_allclose(got, want, rtol=1e-12)

  @pytest.mark.parametrize(
    ("name", "gradients"),
    [
      ("adaptive SVRG", 2 * EPOCHS),
      ("gradient table", EPOCHS),
      ("a pass each 2 epochs", EPOCHS + EPOCHS / 2),
      ("a pass each 4 epochs", EPOCHS + EPOCHS / 4),
      ("1/2 sampled", EPOCHS + EPOCHS / 2),
      ("1/8 sampled, max_alpha=1/8", EPOCHS + EPOCHS / 8),
      # 1/16, 1/8, 1/4, 1/2, and all.
      ("growing samples", EPOCHS + 15 / 16 + EPOCHS - 4),
      ("mean of the epoch before", EPOCHS - 1),
      ("mean so far", EPOCHS),
      ("first half", EPOCHS),
      ("second half", EPOCHS),
    ],
  )
  def test_gradients_are_counted(self, name, gradients):
    assert pull(name)[1].extra_gradients == gradients * STEPS

  def test_coin_flips(self):
    """A snapshot at the start, and then about once per epoch."""
    _, state = pull("coin flips", 40)
    snapshots = int(state.svrg.num_snapshots)
    assert 25 < snapshots < 55
    assert state.extra_gradients == (40 + snapshots) * STEPS

  @pytest.mark.parametrize(
    "name", ["gradient table", "coin flips", "mean of the epoch before"]
  )
  def test_linear_convergence(self, name):
    assert final_norm(pull(name, 150, 0.1)[0]) < 1e-9
    assert final_norm(train(optax.identity(), 150, 0.1)[0]) > 1e-3

  def test_error_of_a_sampled_mean(self):
    """A constant step ends at a distance that a coefficient makes smaller."""
    alone, accounted = (
      final_norm(pull(name, 100, 0.1)[0])
      for name in ("1/8 sampled, alpha = 1", "1/8 sampled, max_alpha=1/8")
    )
    assert alone > 2 * accounted

  def test_mean_so_far(self):
    """Before the batch: the mean over those at the snapshot before it."""
    lever = levers.LEVERS["mean so far"]
    tx = levers.pull(lever, 3, 1)
    params = jnp.zeros(2)
    state = tx.init(params)
    snapshot_grads = jnp.array([[1.0, 2.0], [3.0, 5.0], [4.0, 0.0]])
    for i in range(3):
      before = state.svrg.mean_grads
      g = snapshot_grads[i] + 0.1
      got, state = tx.update(
        g,
        state,
        params,
        grad_fn=lambda p, i=i: snapshot_grads[i],
        batch_index=i,
        batch_grad_fn=None,
      )
      alpha = state.svrg.alpha
      assert (alpha > 0) == (i > 0)
      want = g - alpha * (snapshot_grads[i] - before)
      np.testing.assert_allclose(got, want if i else g, rtol=1e-12)
      mean = snapshot_grads[: i + 1].mean(axis=0)
      np.testing.assert_allclose(state.svrg.mean_grads, mean, rtol=1e-12)


@pytest.mark.usefixtures("x64")
class TestGate:
  def test_opens_where_noise_is_all_that_is_left(self):
    history, state = pull("gated", 150, 0.1)
    assert state.is_open
    assert final_norm(history) < 1e-9

  def test_small_steps_leave_it_shut(self):
    """As plain, for a probe every few epochs."""
    history, state = pull("gated", 40, 1e-4)
    plain, _ = train(optax.identity(), 40, 1e-4)
    assert not state.is_open
    assert state.extra_gradients == 9 * 2 * levers.PROBES
    for got, want in zip(history.values(), plain.values(), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-12)


class TestOverPlain:
  @staticmethod
  def result(gradients, loss):
    return equal_compute.Result(0.1, {0: loss}, 0.9, gradients, 1.0, None)

  def test_power_law(self):
    curve = [self.result(10 * k, 5 / k**2) for k in (1, 2, 3)]
    for gradients in (10, 15, 20, 29, 30):
      loss = 5 * (10 / gradients) ** 2
      result = self.result(gradients, 0.8 * loss)
      assert equal_compute.over_plain(result, curve) == pytest.approx(0.8)
    # As far as the remainder of an epoch goes.
    assert equal_compute.over_plain(self.result(30.5, 1.0), curve) is not None
    assert equal_compute.over_plain(self.result(33, 1.0), curve) is None
