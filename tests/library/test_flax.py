# SPDX-License-Identifier: Apache-2.0
"""Flax NNX with Dropout and BatchNorm, and linen's TrainState."""

import subprocess
import sys

import chex
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from tests import helpers

# Flax and optax.adamw rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion


class Model(nnx.Module):
  """Has everything that a training step moves."""

  def __init__(self, rngs):
    self.embed = nnx.Linear(4, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.embed(x)))
    # Twice, so that a call moves a random count by more than one.
    return self.head(self.dropout(self.dropout(x)))


def loss_fn(model, batch):
  logits = model(batch["x"])
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch["y"]
  ).mean()


def loss_with_aux(model, batch):
  return loss_fn(model, batch), {"aux": jnp.ones(2)}


def batches(n=4, size=8):
  rng = np.random.default_rng(0)
  return [
    {
      "x": jnp.asarray(rng.normal(size=(size, 4)), jnp.float32),
      "y": jnp.asarray(rng.integers(0, 3, size), jnp.int32),
    }
    for _ in range(n)
  ]


def make(alpha=1.0, base=None):
  model = Model(nnx.Rngs(params=0, dropout=1))
  tx = optax.chain(optax_svrg.alpha_svrg(alpha), base or optax.sgd(0.05))
  return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def params_of(model):
  return nnx.as_pure(nnx.state(model, nnx.Param))


def moving(model):
  """Copy of all that is no parameter: batch statistics, counts, keys."""
  state = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
  return jax.tree.map(
    lambda x: np.array(
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    ),
    state,
  )


def snapshot(optimizer, model, data):
  optax_svrg.flax.take_snapshot(
    optimizer, model, optax_svrg.flax.mean_grad_fn(loss_fn, model, data)
  )


@pytest.mark.parametrize(
  ("jit", "has_aux"),
  [(True, True), helpers.slow(True, False), helpers.slow(False, True)],
)
class TestStep:
  def test_gradients_are_bit_equal_at_the_snapshot(self, jit, has_aux):
    model, _ = make()
    loss = loss_with_aux if has_aux else loss_fn

    def step(model, batch):
      params = params_of(model)
      _, grads, grad_fn = optax_svrg.flax.value_and_grad(loss, has_aux=has_aux)(
        model, batch
      )
      return nnx.as_pure(grads), grad_fn(params)

    step = nnx.jit(step) if jit else step
    for batch in batches():
      live, frozen = step(model, batch)
      helpers.assert_equal(live, frozen)

  def test_model_moves_once_as_without_svrg(self, jit, has_aux):
    loss = loss_with_aux if has_aux else loss_fn
    (model, optimizer), (reference, _) = make(), make()
    snapshot(optimizer, model, batches())

    def step(model, optimizer, batch):
      value, grads, grad_fn = optax_svrg.flax.value_and_grad(
        loss, has_aux=has_aux
      )(model, batch)
      optimizer.update(model, grads, grad_fn=grad_fn)
      return value

    step = nnx.jit(step) if jit else step
    for count, batch in enumerate(batches(), start=1):
      # The same parameters, so that batch statistics can be compared.
      nnx.update(reference, nnx.state(model, nnx.Param))
      value = step(model, optimizer, batch)
      want = loss(reference, batch)
      chex.assert_trees_all_close(value, want, rtol=1e-5)
      chex.assert_trees_all_close(
        moving(model), moving(reference), rtol=1e-5, atol=1e-7
      )
      assert model.dropout.rngs.count[...] == 2 * count
      assert helpers.svrg_state(nnx.as_pure(optimizer.opt_state)).count == count


@pytest.mark.parametrize("jit", [True, helpers.slow(False)])
def test_snapshot_moves_nothing(jit):
  model, optimizer = make()
  loss_fn(model, batches()[0])  # Away from the initial values.
  before = moving(model), params_of(model)
  data = tuple(batches())
  take = lambda model, optimizer: snapshot(optimizer, model, data)
  (nnx.jit(take) if jit else take)(model, optimizer)
  helpers.assert_equal((moving(model), params_of(model)), before)
  state = helpers.svrg_state(nnx.as_pure(optimizer.opt_state))
  assert state.num_snapshots == 1
  helpers.assert_equal(state.snapshot_params, before[1])


def test_mean_is_over_the_masks_that_training_draws():
  """A pass of training over the same batches averages to the mean gradient."""
  model, _ = make()
  mean = optax_svrg.flax.mean_grad_fn(loss_fn, model, batches())(
    params_of(model)
  )
  grads = [
    nnx.as_pure(optax_svrg.flax.value_and_grad(loss_fn)(model, batch)[1])
    for batch in batches()
  ]
  want = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
  helpers.assert_close(mean, want, rtol=1e-5, atol=1e-7)
  # The masks do matter.
  assert not np.allclose(
    optax_svrg.flax.mean_grad_fn(loss_fn, model, batches())(params_of(model))[
      "head"
    ]["kernel"],
    mean["head"]["kernel"],
    rtol=1e-3,
  )


def test_adaptive():
  model = Model(nnx.Rngs(params=0, dropout=1))
  tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.05))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def train_step(model, optimizer, batch):
    _, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)

  alphas = []
  for _ in range(2):
    snapshot(optimizer, model, batches())
    for batch in batches():
      train_step(model, optimizer, batch)
      alphas.append(float(optax.tree.get(optimizer.opt_state, "alpha")[...]))
  assert alphas[0] == alphas[4] == 1
  assert 0 < alphas[3] < 1


def test_mean_can_be_taken_again():
  """As take_snapshot does for states that round the snapshot differently."""
  model = Model(nnx.Rngs(params=0, dropout=1))
  tx = optax.chain(
    optax_svrg.alpha_svrg(0.5),
    optax_svrg.alpha_svrg(0.5, snapshot_dtype="bfloat16"),
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  snapshot(optimizer, model, batches())
  exact, rounded = nnx.as_pure(optimizer.opt_state)
  mean = optax_svrg.flax.mean_grad_fn(loss_fn, model, batches())
  params = params_of(model)
  low = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), params)
  helpers.assert_close(exact.mean_grads, mean(params), rtol=1e-6)
  helpers.assert_close(rounded.mean_grads, mean(low), rtol=1e-6)


def test_pass_and_step_are_compiled_once():
  model, optimizer = make(optax_svrg.linear_decay(1.0, 3, 4), optax.adam(1e-3))
  traces = []

  def counted_loss(model, batch):
    traces.append(1)
    return loss_fn(model, batch)

  @nnx.jit
  def step(model, optimizer, batch):
    _, grads, grad_fn = optax_svrg.flax.value_and_grad(counted_loss)(
      model, batch
    )
    optimizer.update(model, grads, grad_fn=grad_fn)

  per_epoch = []
  for _ in range(3):
    optax_svrg.flax.take_snapshot(
      optimizer,
      model,
      optax_svrg.flax.mean_grad_fn(counted_loss, model, batches()),
    )
    for batch in batches():
      step(model, optimizer, batch)
    per_epoch.append(len(traces))
  assert per_epoch[0] == per_epoch[2]


def test_training_reduces_the_loss_and_uses_the_correction():
  model, optimizer = make(optax_svrg.linear_decay(0.75, 20, 4))
  plain, plain_optimizer = make(0)
  data = batches()

  @nnx.jit
  def step(model, optimizer, batch):
    loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss

  first = None
  for _ in range(20):
    snapshot(optimizer, model, data)
    losses = [float(step(model, optimizer, batch)) for batch in data]
    [step(plain, plain_optimizer, batch) for batch in data]
    first = first or np.mean(losses)
  assert np.mean(losses) < 0.8 * first
  assert not np.allclose(
    model.head.kernel[...], plain.head.kernel[...], rtol=1e-3
  )


def test_part_of_the_variables():
  """With wrt= only these have a snapshot; the rest is closed over."""
  model = Model(nnx.Rngs(0))
  wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
  tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=wrt)
  data = batches()
  optax_svrg.flax.take_snapshot(
    optimizer,
    model,
    optax_svrg.flax.mean_grad_fn(loss_fn, model, data, wrt=wrt),
  )
  state = helpers.svrg_state(nnx.as_pure(optimizer.opt_state))
  assert set(state.snapshot_params) == {"head"}
  embed = np.array(model.embed.kernel[...])
  _, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn, wrt=wrt)(
    model, data[0]
  )
  updates = optimizer.update(model, grads, grad_fn=grad_fn)
  # At the snapshot the corrected gradient is the mean.
  want = jax.tree.map(lambda m: -0.1 * m, state.mean_grads)
  chex.assert_trees_all_close(updates, want, rtol=1e-6)
  np.testing.assert_array_equal(model.embed.kernel[...], embed)


def test_another_wrt_than_the_optimizers_is_named():
  model = Model(nnx.Rngs(0))
  wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
  tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=wrt)
  message = r"wrt=Param names other variables .* the same wrt"
  with pytest.raises(ValueError, match=message):
    snapshot(optimizer, model, batches())
  grad_fn = optax_svrg.flax.grad_fn(loss_fn, model, batches()[0])
  with pytest.raises(ValueError, match=message):
    grad_fn(nnx.state(model, wrt))


@pytest.mark.parametrize("has_aux", [False, True])
def test_several_arguments(has_aux):
  """As nnx.value_and_grad takes them."""

  def loss(model, x, y, scale=1.0):
    value = scale * loss_fn(model, {"x": x, "y": y})
    return (value, {"aux": x}) if has_aux else value

  batch = batches()[0]
  model, reference = (Model(nnx.Rngs(params=0, dropout=1)) for _ in range(2))
  params = params_of(model)
  value, grads, grad_fn = optax_svrg.flax.value_and_grad(loss, has_aux=has_aux)(
    model, batch["x"], batch["y"], scale=2.0
  )
  want, want_grads = nnx.value_and_grad(loss, has_aux=has_aux)(
    reference, batch["x"], batch["y"], scale=2.0
  )
  chex.assert_trees_all_equal(value, want)
  helpers.assert_equal(nnx.as_pure(grads), nnx.as_pure(want_grads))
  helpers.assert_equal(grad_fn(params), nnx.as_pure(grads))


def test_arguments_in_the_wrong_order():
  model, optimizer = make()
  with pytest.raises(
    TypeError, match=r"optimizer must be an nnx\.Optimizer, got a Model"
  ):
    optax_svrg.flax.take_snapshot(model, optimizer, lambda p: p)
  with pytest.raises(
    TypeError, match=r"model must be an nnx\.Module, got a fun"
  ):
    optax_svrg.flax.grad_fn(model, loss_fn, batches()[0])
  with pytest.raises(TypeError, match="loss_fn must be a function, got 3"):
    optax_svrg.flax.mean_grad_fn(3, model, batches())


class TestLinenTrainState:
  X = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
  BATCHES = (X[:4], X[4:8], X[8:])
  MODEL = linen.Dense(1)

  def loss(self, params, batch):
    return jnp.mean((self.MODEL.apply(params, batch) - 1) ** 2)

  def create(self, transform, make=None):
    return (make or optax_svrg.flax.TrainState).create(
      apply_fn=self.MODEL.apply,
      params=self.MODEL.init(jax.random.key(0), self.X),
      tx=optax.chain(transform, optax.adam(0.1)),
    )

  @pytest.mark.parametrize("method", ["svrg", "saga"])
  def test_trains_as_the_transformation_does(self, method):
    transform = {
      "svrg": optax_svrg.alpha_svrg(0.75),
      "saga": optax_svrg.alpha_saga(0.75, 3),
    }[method]
    grad = jax.grad(self.loss)
    state = self.create(transform)
    params, opt_state = state.params, state.opt_state
    mean = lambda p: optax_svrg.mean_gradient(grad, p, self.BATCHES)

    @jax.jit
    def step(state, batch, index):
      extra = {"grad_fn": lambda p: grad(p, batch), "batch_index": index}
      return state.apply_gradients(grads=grad(state.params, batch), **extra)

    for _ in range(2):
      if method == "svrg":
        state = optax_svrg.take_snapshot(state, state.params, mean)
        opt_state = optax_svrg.take_snapshot(opt_state, params, mean)
      for index, batch in enumerate(self.BATCHES):
        state = step(state, batch, index)
        updates, opt_state = state.tx.update(
          grad(params, batch),
          opt_state,
          params,
          grad_fn=lambda p, b=batch: grad(p, b),
          batch_index=index,
        )
        params = optax.apply_updates(params, updates)
    assert isinstance(state, optax_svrg.flax.TrainState)
    assert state.step == 6
    assert optax_svrg.summary(state)["alpha"] == 0.75
    helpers.assert_close(state.params, params, rtol=1e-5)

  def test_replaces_fields_as_flax_does(self):
    class WithStatistics(optax_svrg.flax.TrainState):
      batch_stats: int = 0

    state = self.create(optax_svrg.alpha_saga(0.5, 3), WithStatistics)
    grads = jax.tree.map(jnp.ones_like, state.params)
    new = state.apply_gradients(grads=grads, batch_stats=7, batch_index=1)
    assert (new.batch_stats, new.step) == (7, 1)
    assert new.tx is state.tx
    plain = self.create(optax.identity(), WithStatistics)
    assert plain.apply_gradients(grads=grads, batch_stats=3).batch_stats == 3


@pytest.mark.parametrize("pure", [False, True])
def test_core_take_snapshot_on_an_nnx_optimizer_state(pure):
  model, optimizer = make()
  opt_state, params = optimizer.opt_state, nnx.state(model, nnx.Param)
  if pure:
    opt_state, params = nnx.as_pure((opt_state, params))
  seen = []

  def mean_grad_fn(p):
    seen.append(jax.tree.structure(p))
    return jax.tree.map(jnp.ones_like, p)

  new = optax_svrg.take_snapshot(opt_state, params, mean_grad_fn)
  assert jax.tree.structure(new) == jax.tree.structure(opt_state)
  assert seen == [jax.tree.structure(params)]
  nnx.update(optimizer.opt_state, nnx.state(new))
  state = helpers.svrg_state(nnx.as_pure(optimizer.opt_state))
  assert state.num_snapshots == 1
  helpers.assert_equal(
    state.mean_grads, jax.tree.map(jnp.ones_like, params_of(model))
  )


def test_donation():
  model, optimizer = make(0.5, optax.adam(1e-3))
  snapshot(optimizer, model, batches())

  @nnx.jit(donate_argnums=(0, 1))
  def step(model, optimizer, batch):
    loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss

  for batch in batches():
    assert jnp.isfinite(step(model, optimizer, batch))
  snapshot(optimizer, model, batches())
  assert jnp.isfinite(step(model, optimizer, batches()[0]))


@pytest.mark.parametrize("kind", ["adaptive", helpers.slow("alpha")])
def test_saga(kind):
  """One gradient per step: nnx.grad and batch_index are all it needs."""
  data = batches()
  saga = {
    "alpha": optax_svrg.alpha_saga(0.5, len(data)),
    "adaptive": optax_svrg.adaptive_saga(len(data), table_dtype=jnp.bfloat16),
  }[kind]
  model = Model(nnx.Rngs(params=0, dropout=1))
  tx = optax.chain(saga, optax.sgd(0.05))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  reference = tx.init(params_of(model))
  update = jax.jit(lambda g, s, i: tx.update(g, s, batch_index=i))
  traces = []

  @nnx.jit(donate_argnums=(0, 1))
  def step(model, optimizer, batch, i):
    traces.append(1)
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    updates = optimizer.update(model, grads, batch_index=i)
    return loss, nnx.as_pure((grads, updates))

  first, alphas = None, []
  for _ in range(15):
    losses = []
    for i, batch in enumerate(data):
      loss, (grads, updates) = step(model, optimizer, batch, i)
      want, reference = update(grads, reference, i)
      chex.assert_trees_all_close(updates, want, rtol=1e-4, atol=1e-6)
      losses.append(float(loss))
      alphas.append(float(optax.tree.get(optimizer.opt_state, "alpha")[...]))
    first = first or np.mean(losses)
  assert len(traces) == 1
  assert alphas[: len(data)] == [0] * len(data)
  assert alphas[-1] > 0
  assert np.mean(losses) < 0.9 * first


def test_missing_batch_index_raises_through_nnx():
  model = Model(nnx.Rngs(params=0, dropout=1))
  tx = optax.chain(optax_svrg.adaptive_saga(4), optax.sgd(0.05))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  grads = nnx.grad(loss_fn)(model, batches()[0])
  with pytest.raises(ValueError, match="extra argument batch_index"):
    optimizer.update(model, grads)


def test_batches_are_checked_before_anything_changes():
  model, optimizer = make()
  with pytest.raises(TypeError, match="batches must be an iterable of batches"):
    snapshot(optimizer, model, batches()[0])
  with pytest.raises(ValueError, match="at least one batch, got none"):
    snapshot(optimizer, model, [])
  state = helpers.svrg_state(nnx.as_pure(optimizer.opt_state))
  assert state.num_snapshots == 0


def test_missing_grad_fn_raises_through_nnx():
  model, optimizer = make()
  grads = nnx.grad(loss_fn)(model, batches()[0])
  with pytest.raises(ValueError, match=r"exactly one of .*grad_fn"):
    optimizer.update(model, grads)


def test_flax_is_imported_only_when_used():
  code = (
    "import sys, optax_svrg; assert 'flax' not in sys.modules;"
    "optax_svrg.flax.take_snapshot; assert 'flax' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
