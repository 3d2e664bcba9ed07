# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""alpha_svrg in Optax's chains and wrappers."""

from collections.abc import Callable

import chex
from flax import linen
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_svrg
from tests import helpers

# The optimizers that follow rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(12, 2)), jnp.float32)
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
PARAMS = {
  "layer": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)},
  "scale": jnp.array(1.0),
}


def loss(params, batch):
  x, y = batch
  hidden = x @ params["layer"]["w"] + params["layer"]["b"]
  return jnp.mean((params["scale"] * jnp.tanh(hidden) - y) ** 2)


GRAD = jax.grad(loss)


def mean_grad(params):
  return optax_svrg.mean_gradient(GRAD, params, BATCHES)


def shielded(
  tx: optax.GradientTransformationExtraArgs, *names: str
) -> optax.GradientTransformationExtraArgs:
  """Keeps extra arguments from a transformation that refuses them."""

  def update(updates, state, params=None, **extra_args):
    for name in names:
      extra_args.pop(name, None)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def labels(params):
  return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)


# Optimizers to follow alpha_svrg in a chain.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "sgd": lambda: optax.sgd(0.1),
  "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-2),
  "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
  "lion": lambda: optax.lion(1e-2),
  "muon": lambda: optax.contrib.muon(1e-2),
  "lbfgs": lambda: shielded(optax.lbfgs(), "grad_fn", "snapshot_grads"),
  "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
  "clip_by_global_norm": lambda: optax.chain(
    optax.clip_by_global_norm(0.1), optax.adamw(1e-2)
  ),
  "MultiSteps": lambda: optax.MultiSteps(
    optax.adam(1e-2), 2
  ).gradient_transformation(),
  "partition": lambda: optax.partition(
    {"matrix": optax.adam(1e-2), "rest": optax.sgd(0.1)}, labels
  ),
  "masked": lambda: optax.chain(
    optax.masked(
      optax.add_decayed_weights(0.1),
      lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ),
    optax.sgd(0.1),
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
    learning_rate=optax.linear_schedule(1e-2, 0.0, 10)
  ),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}

# Where the state of alpha_svrg may hide, and how to call it there.
WRAPPERS = {
  "bare": lambda tx: tx,
  "chain": lambda tx: optax.chain(optax.trace(0.9), optax.chain(tx)),
  "named_chain": lambda tx: optax.named_chain(("a", tx), ("b", optax.sgd(1.0))),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
  "inject_hyperparams": lambda tx: optax.chain(
    optax.inject_hyperparams(optax_svrg.alpha_svrg)(alpha=0.5)
  ),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "conditionally_transform": lambda tx: optax.conditionally_transform(
    tx, lambda step: step < 10
  ),
  "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
  "masked_all": lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("jit", [False, True])
def test_the_optimizer_sees_the_corrected_gradient(name, jit):
  """A chain equals the optimizer alone, fed with the formula by hand."""
  alpha = optax_svrg.linear_decay(0.75, 2, 3)
  tx = optax.chain(optax_svrg.alpha_svrg(alpha), OPTIMIZERS[name]())
  reference = optax.with_extra_args_support(OPTIMIZERS[name]())

  def kwargs(params, batch, grads):
    if name != "lbfgs":
      return {}
    return {
      "value": loss(params, batch),
      "grad": grads,
      "value_fn": lambda p: loss(p, batch),
    }

  def step(params, state, batch):
    grad_fn = lambda p: GRAD(p, batch)
    grads = grad_fn(params)
    updates, state = tx.update(
      grads,
      state,
      params,
      grad_fn=grad_fn,
      **kwargs(params, batch, grads),
    )
    return optax.apply_updates(params, updates), state

  def reference_step(params, state, batch, snapshot, coefficient):
    grads = jax.tree.map(
      lambda g, s, mu: g - coefficient * (s - mu),
      GRAD(params, batch),
      GRAD(snapshot, batch),
      mean_grad(snapshot),
    )
    extra = kwargs(params, batch, GRAD(params, batch))
    updates, state = reference.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  if jit:
    step, reference_step = jax.jit(step), jax.jit(reference_step)
  params = want = PARAMS
  state, want_state = tx.init(params), reference.init(want)
  for epoch in range(2):
    snapshot = want
    state = optax_svrg.take_snapshot(state, params, mean_grad)
    for i, batch in enumerate(BATCHES):
      params, state = step(params, state, batch)
      want, want_state = reference_step(
        want, want_state, batch, snapshot, alpha(3 * epoch + i)
      )
      chex.assert_trees_all_close(params, want, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(state[1], want_state, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("jit", [False, True])
def test_take_snapshot_finds_the_state(name, jit):
  tx = WRAPPERS[name](optax_svrg.alpha_svrg(0.5))
  take = lambda s, p: optax_svrg.take_snapshot(s, p, mean_grad)
  take = jax.jit(take) if jit else take
  before = tx.init(PARAMS)
  params = helpers.perturbed(PARAMS)
  state = take(take(before, PARAMS), params)
  assert jax.tree.structure(state) == jax.tree.structure(before)
  svrg = helpers.svrg_state(state)
  assert svrg.num_snapshots == 2
  helpers.assert_equal(svrg.snapshot_params, params)
  helpers.assert_close(svrg.mean_grads, mean_grad(params), rtol=1e-6)
  # Everything else is left as it was.
  is_state = lambda x: isinstance(x, optax_svrg.SVRGState)
  rest = lambda s: jax.tree.map(
    lambda x: None if is_state(x) else x, s, is_leaf=is_state
  )
  helpers.assert_equal(rest(state), rest(before))
  # And the wrapper passes grad_fn on (MultiSteps shows it at every second).
  batch = BATCHES[0]
  grad_fn = lambda p: GRAD(p, batch)
  for _ in range(2):
    _, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
  assert helpers.svrg_state(state).alpha == 0.5


@pytest.mark.parametrize(
  "name", sorted(WRAPPERS.keys() - {"inject_hyperparams", "MultiSteps"})
)
def test_adaptive_in_every_wrapper(name):
  """The estimate goes on there, and a snapshot begins it anew."""
  tx = WRAPPERS[name](optax_svrg.adaptive_svrg())
  params = helpers.perturbed(PARAMS, -0.4)

  @jax.jit
  def step(state, batch):
    grad_fn = lambda p: GRAD(p, batch)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[1]

  state = tx.init(PARAMS)
  types = helpers.types(helpers.svrg_state(state))
  alphas = []
  for _ in range(2):
    state = optax_svrg.take_snapshot(state, PARAMS, mean_grad)
    for batch in BATCHES * 2:
      state = step(state, batch)
      alphas.append(float(optax.tree.get(state, "alpha")))
  assert helpers.types(helpers.svrg_state(state)) == types
  assert alphas[0] == alphas[6] == 1
  assert 0 < alphas[5] < 1
  assert 0 < optax.tree.get(state, "variance_ratio") <= 1


def test_snapshot_of_several_states():
  """One pass serves all that store the same snapshot; each has its own."""
  calls = []

  def counted(params):
    calls.append(1)
    return mean_grad(params)

  tx = optax.chain(
    optax_svrg.alpha_svrg(0.5),
    optax_svrg.alpha_svrg(0.25),
    optax_svrg.alpha_svrg(0.25, snapshot_dtype=jnp.bfloat16),
  )
  params = helpers.perturbed(PARAMS, 0.1234567)
  first, second, rounded = optax_svrg.take_snapshot(
    tx.init(PARAMS), params, counted
  )
  assert len(calls) == 2
  helpers.assert_equal(first, second)
  low = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), params)
  helpers.assert_close(rounded.mean_grads, mean_grad(low), rtol=1e-6)
  pointers = [
    x.unsafe_buffer_pointer() for x in jax.tree.leaves((first, second, rounded))
  ]
  assert len(set(pointers)) == len(pointers)


def partition(**kwargs):
  return optax.partition(
    {
      "matrix": optax_svrg.alpha_svrg(1.0),
      "rest": optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1)),
    },
    labels,
    **kwargs,
  )


@pytest.mark.parametrize("jit", [False, True])
def test_snapshot_and_arrays_inside_partition(jit):
  """Masked snapshots take the array form, where the wrapper masks it alike."""
  tx = partition(mask_compatible_extra_args=True)
  take = lambda s, p: optax_svrg.take_snapshot(s, p, mean_grad)
  state = (jax.jit(take) if jit else take)(tx.init(PARAMS), PARAMS)
  inner = state.inner_states
  matrix = inner["matrix"].inner_state
  rest = inner["rest"].inner_state[0]
  mean = mean_grad(PARAMS)
  masked = optax.MaskedNode()
  helpers.assert_close(
    matrix.mean_grads,
    {"layer": {"w": mean["layer"]["w"], "b": masked}, "scale": masked},
    rtol=1e-6,
  )
  helpers.assert_close(
    rest.mean_grads,
    {"layer": {"w": masked, "b": mean["layer"]["b"]}, "scale": mean["scale"]},
    rtol=1e-6,
  )
  batch = BATCHES[0]
  grads = GRAD(PARAMS, batch)
  updates, state = tx.update(grads, state, PARAMS, snapshot_grads=grads)
  # At the snapshot alpha = 1 gives the mean gradient.
  helpers.assert_close(updates["layer"]["w"], mean["layer"]["w"], rtol=1e-6)


class TestMisuse:
  """An error says what to write instead."""

  BATCH = BATCHES[0]

  def update(self, tx, params=PARAMS, **kwargs):
    grads = GRAD(params, self.BATCH)
    return tx.update(grads, tx.init(params), params, **kwargs)

  def grad_fn(self, params):
    return GRAD(params, self.BATCH)

  @pytest.mark.parametrize(
    "tx",
    [
      partition(),
      partition(mask_compatible_extra_args=True),
      optax.masked(
        optax_svrg.alpha_svrg(1.0),
        {"layer": {"w": True, "b": False}, "scale": True},
      ),
      optax.masked(optax_svrg.alpha_svrg(0.5), {"layer": False, "scale": True}),
    ],
  )
  def test_masked_snapshot(self, tx):
    with pytest.raises(
      ValueError, match=r"Write optax\.chain\(alpha_svrg\(\.\.\.\), optax\.mask"
    ):
      self.update(tx, grad_fn=self.grad_fn)

  def test_full_tree_against_a_masked_snapshot(self):
    with pytest.raises(ValueError, match=r"snapshot_grads .*MaskedNode.*chain"):
      self.update(partition(), snapshot_grads=GRAD(PARAMS, self.BATCH))

  def test_snapshot_of_a_masked_subtree(self):
    tx = optax.masked(
      optax_svrg.alpha_svrg(0.5), {"layer": False, "scale": True}
    )
    state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
    svrg = helpers.svrg_state(state)
    assert svrg.snapshot_params["layer"] == optax.MaskedNode()
    helpers.assert_close(
      svrg.mean_grads["scale"], mean_grad(PARAMS)["scale"], rtol=1e-6
    )
    with pytest.raises(
      ValueError, match=r"params must have the tree structure"
    ):
      optax_svrg.take_snapshot(tx.init(PARAMS), {"scale": 1.0}, mean_grad)

  def test_flattened_snapshot(self):
    tx = optax.flatten(optax_svrg.alpha_svrg(1.0))
    hint = r"write optax\.chain\(alpha_svrg\(\.\.\.\), optax\.flatten\(\.\.\.\)"
    with pytest.raises(ValueError, match=rf"params .*{hint}"):
      optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
    state = tx.init(PARAMS)._replace(num_snapshots=jnp.array(1))
    with pytest.raises(ValueError, match=rf"grad_fn failed .*{hint}"):
      tx.update(self.grad_fn(PARAMS), state, PARAMS, grad_fn=self.grad_fn)

  @pytest.mark.parametrize(
    "tx",
    [
      optax.chain(
        optax.MultiSteps(
          optax_svrg.alpha_svrg(1.0), 2
        ).gradient_transformation()
      ),
      optax.chain(
        optax.GradientTransformation(
          *optax_svrg.alpha_svrg(1.0)  # The plain type drops extra arguments.
        )
      ),
    ],
  )
  def test_wrapper_that_drops_the_argument(self, tx):
    with pytest.raises(ValueError, match=r"got neither.* may have dropped"):
      self.update(tx, grad_fn=self.grad_fn)


@pytest.mark.parametrize(
  ("transform", "estimate"),
  [
    (optax_svrg.alpha_svrg(0.5), None),
    (optax_svrg.adaptive_svrg(), ("other",) * 4),
  ],
)
def test_map_params_marks_the_parameter_trees(transform, estimate):
  """What shardings of the state are derived with."""
  tx = optax.chain(transform, optax.adam(1e-3))
  state = optax.tree.map_params(
    tx,
    lambda _: "param",
    tx.init(PARAMS),
    transform_non_params=lambda _: "other",
  )
  svrg = state[0]
  marked = jax.tree.map(lambda _: "param", PARAMS)
  assert svrg == ("other", "other", "other", marked, marked, estimate)


def test_apply_if_finite_skips_a_bad_step():
  tx = optax.chain(
    optax_svrg.alpha_svrg(1.0), optax.apply_if_finite(optax.sgd(0.1), 3)
  )
  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  grads = GRAD(PARAMS, BATCHES[0])
  bad = jax.tree.map(lambda g: g * jnp.nan, grads)
  updates, state = tx.update(grads, state, PARAMS, snapshot_grads=bad)
  helpers.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize("inside", [False, True])
def test_gradient_accumulation(inside):
  """MultiSteps after alpha_svrg is exact; around it, it is not."""
  svrg = optax_svrg.alpha_svrg(1.0)
  if inside:
    tx = optax.MultiSteps(optax.chain(svrg, optax.sgd(1.0)), 3)
  else:
    tx = optax.chain(
      svrg, optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation()
    )
  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  point = helpers.perturbed(PARAMS)
  for batch in BATCHES:
    grad_fn = lambda p, b=batch: GRAD(p, b)
    updates, state = tx.update(grad_fn(point), state, point, grad_fn=grad_fn)
  want = jax.tree.map(lambda g: -g, mean_grad(point))
  if inside:
    with pytest.raises(AssertionError):
      chex.assert_trees_all_close(updates, want, rtol=1e-2)
  else:
    chex.assert_trees_all_close(updates, want, rtol=1e-4, atol=1e-6)


def test_frozen_base_weights():
  """Only the trainable tree is params; the loss closes over the rest."""
  base = PARAMS["layer"]
  grad = jax.grad(lambda p, b: loss({"layer": base, **p}, b))
  tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
  params = {"scale": PARAMS["scale"]}
  state = optax_svrg.take_snapshot(
    tx.init(params),
    params,
    lambda p: optax_svrg.mean_gradient(grad, p, BATCHES),
  )
  grad_fn = lambda p: grad(p, BATCHES[0])
  updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
  helpers.assert_close(
    updates["scale"], -0.1 * mean_grad(PARAMS)["scale"], rtol=1e-6
  )
  assert jax.tree.structure(state[0].snapshot_params) == jax.tree.structure(
    params
  )


@pytest.mark.parametrize(
  "transform",
  [
    optax_svrg.alpha_svrg(
      optax_svrg.linear_decay(0.75, 4, 3), snapshot_dtype=jnp.bfloat16
    ),
    optax_svrg.adaptive_svrg(),
  ],
)
def test_checkpoint(tmp_path, transform):
  """A run that was saved between two snapshots goes on to the last bit."""
  tx = optax.chain(transform, optax.adam(1e-2))

  @jax.jit
  def train_step(params, state, batch):
    grad_fn = lambda p: GRAD(p, batch)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  saved = train_step(PARAMS, state, BATCHES[0])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", saved)
    checkpointer.wait_until_finished()
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
    restored = checkpointer.restore(tmp_path / "state", like)
  helpers.assert_equal(restored, saved)
  for batch in BATCHES[1:]:
    saved, restored = train_step(*saved, batch), train_step(*restored, batch)
  helpers.assert_equal(restored, saved)
  assert saved[1][0].alpha > 0


def test_linen_train_state():
  """TrainState forwards no extra arguments: call its tx (README)."""
  model = linen.Dense(2)
  params = model.init(jax.random.key(0), X)
  linen_loss = lambda p, b: jnp.mean((model.apply(p, b[0]) - b[1]) ** 2)
  grad = jax.grad(linen_loss)
  tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.adam(0.1))
  state = train_state.TrainState.create(
    apply_fn=model.apply, params=params, tx=tx
  )

  @jax.jit
  def train_step(state, batch):
    grad_fn = lambda p: grad(p, batch)
    updates, opt_state = state.tx.update(
      grad_fn(state.params), state.opt_state, state.params, grad_fn=grad_fn
    )
    return state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )

  first = linen_loss(state.params, (X, Y))
  for _ in range(10):
    state = state.replace(
      opt_state=optax_svrg.take_snapshot(
        state.opt_state,
        state.params,
        lambda p: optax_svrg.mean_gradient(grad, p, BATCHES),
      )
    )
    for batch in BATCHES:
      state = train_step(state, batch)
  optimum = jnp.linalg.lstsq(jnp.c_[X, jnp.ones(12)], Y)[0]
  least = jnp.mean((jnp.c_[X, jnp.ones(12)] @ optimum - Y) ** 2)
  assert state.step == 30
  last = linen_loss(state.params, (X, Y))
  assert last - least < 0.1 * (first - least)
  with pytest.raises(ValueError, match="got neither"):
    state.apply_gradients(grads=grad(state.params, BATCHES[0]))
