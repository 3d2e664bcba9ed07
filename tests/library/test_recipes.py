# SPDX-License-Identifier: Apache-2.0
"""Models of Equinox and of Haiku, and wrappers that drop arguments."""

import equinox as eqx
from flax.training import train_state
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg

# These libraries rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
Y = jnp.sin(X.sum(axis=1, keepdims=True))
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
METHODS = {
  "svrg": lambda: optax_svrg.alpha_svrg(1.0),
  "saga": lambda: optax_svrg.adaptive_saga(len(BATCHES)),
}


def train(tx, params, loss, epochs=15):
  """The parameters and the losses at both ends."""
  grad = jax.grad(loss)

  @jax.jit
  def step(params, state, batch, index):
    grad_fn = lambda p: grad(p, batch)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, batch_index=index
    )
    return optax.apply_updates(params, updates), state

  state, first = tx.init(params), loss(params, (X, Y))
  for _ in range(epochs):
    if "num_snapshots" in optax_svrg.summary(state):
      state = optax_svrg.take_snapshot(
        state, params, lambda p: optax_svrg.mean_gradient(grad, p, BATCHES)
      )
    for index, batch in enumerate(BATCHES):
      params, state = step(params, state, batch, index)
  assert optax_svrg.summary(state)["alpha"] > 0
  return params, first, loss(params, (X, Y))


class TestEquinox:
  MODEL = eqx.nn.MLP(3, 1, 8, 2, key=jax.random.key(0))

  @staticmethod
  def loss(model, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)

  @pytest.mark.parametrize("method", METHODS)
  def test_partition_and_combine(self, method):
    params, static = eqx.partition(self.MODEL, eqx.is_inexact_array)
    loss = lambda p, batch: self.loss(eqx.combine(p, static), batch)
    tx = optax.chain(METHODS[method](), optax.sgd(0.1))
    params, first, last = train(tx, params, loss)
    assert last < 0.7 * first
    assert eqx.combine(params, static)(X[0]).shape == (1,)

  @pytest.mark.parametrize("method", METHODS)
  def test_a_model_with_functions_is_refused(self, method):
    with pytest.raises(
      TypeError, match=r"params must have float .* eqx\.partition.*eqx\.combine"
    ):
      METHODS[method]().init(self.MODEL)

  def test_a_gradient_of_the_model_where_that_of_params_is_wanted(self):
    """The snapshot holds None in place of functions, and cannot be called."""
    params = eqx.filter(self.MODEL, eqx.is_inexact_array)
    tx = METHODS["svrg"]()
    state = optax_svrg.take_snapshot(tx.init(params), params, lambda p: p)
    grads = eqx.filter_grad(self.loss)(self.MODEL, BATCHES[0])
    with pytest.raises(
      ValueError, match=r"The snapshot holds None .*eqx\.combine\(q, static\)"
    ):
      tx.update(
        grads,
        state,
        params,
        grad_fn=lambda m: eqx.filter_grad(self.loss)(m, BATCHES[0]),
      )


@pytest.mark.parametrize("method", METHODS)
def test_haiku(method):
  model = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([8, 1], activation=jnp.tanh)(x))
  )
  params = model.init(jax.random.key(0), X)
  # What Haiku's own users have since FlatMap, and before.
  for tree in (params, hk.data_structures.to_immutable_dict(params)):
    loss = lambda p, batch: jnp.mean((model.apply(p, batch[0]) - batch[1]) ** 2)
    tx = optax.chain(METHODS[method](), optax.sgd(0.1))
    got, first, last = train(tx, tree, loss)
    assert type(got) is type(tree)
    assert last < 0.8 * first


@pytest.mark.parametrize(
  ("method", "argument"), [("svrg", "grad_fn"), ("saga", "batch_index")]
)
def test_who_drops_an_argument_is_named(method, argument):
  """The error of linen's TrainState names the one to use instead."""
  tx = METHODS[method]()
  params = {"w": jnp.ones(2)}
  state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
  message = (
    rf"{argument}.*apply_gradients of a linen TrainState"
    r" \(use optax_svrg\.flax\.TrainState\), jaxopt\.OptaxSolver and"
    r" optimistix\.OptaxMinimiser"
  )
  with pytest.raises(ValueError, match=message):
    state.apply_gradients(grads=params)
