# SPDX-License-Identifier: Apache-2.0
"""alpha_svrg and the SAGA transformations in Optax's chains and wrappers."""

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


def names(mapping, *fast):
  """Its keys as parameters of a test, of which some are of the fast tier."""
  return [name if name in fast else helpers.slow(name) for name in mapping]


@pytest.mark.parametrize("name", names(OPTIMIZERS, "adamw", "partition"))
def test_the_optimizer_sees_the_corrected_gradient(name):
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


@pytest.mark.parametrize(
  "name", names(WRAPPERS, "named_chain", "MultiSteps", "masked_all")
)
def test_take_snapshot_finds_the_state(name):
  tx = WRAPPERS[name](optax_svrg.alpha_svrg(0.5))
  take = jax.jit(lambda s, p: optax_svrg.take_snapshot(s, p, mean_grad))
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
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=grad_fn))
  for _ in range(2):
    _, state = update(grad_fn(params), state, params)
  assert helpers.svrg_state(state).alpha == 0.5


@pytest.mark.parametrize(
  "name",
  [
    name if name == "chain" else helpers.slow(name)
    for name in WRAPPERS
    if name not in ("inject_hyperparams", "MultiSteps")
  ],
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


@pytest.mark.parametrize("jit", [True, helpers.slow(False)])
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
    "error", [KeyError("shape"), ZeroDivisionError("axis"), ValueError("disk")]
  )
  def test_errors_that_flatten_has_nothing_to_do_with(self, error):
    """They pass as they are."""

    def grad_fn(params):
      raise error

    tx = optax.flatten(optax_svrg.alpha_svrg(1.0))
    state = tx.init(PARAMS)._replace(num_snapshots=jnp.array(1))
    with pytest.raises(type(error)) as caught:
      tx.update(self.grad_fn(PARAMS), state, PARAMS, grad_fn=grad_fn)
    assert caught.value is error

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
    (optax_svrg.adaptive_svrg(), ("other",) * 5),
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
  want = optax_svrg.SVRGState(
    count="other",
    num_snapshots="other",
    alpha="other",
    snapshot_params=marked,
    mean_grads=marked,
    is_finite="other",
    estimate=estimate,
  )
  assert svrg == want


def test_apply_if_finite_skips_a_bad_step():
  tx = optax.chain(
    optax_svrg.alpha_svrg(1.0), optax.apply_if_finite(optax.sgd(0.1), 3)
  )
  state = optax_svrg.take_snapshot(tx.init(PARAMS), PARAMS, mean_grad)
  grads = GRAD(PARAMS, BATCHES[0])
  bad = jax.tree.map(lambda g: g * jnp.nan, grads)
  updates, state = tx.update(bad, state, PARAMS, snapshot_grads=grads)
  helpers.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
  # A bad gradient at the snapshot costs the correction alone.
  updates, _ = tx.update(grads, state, PARAMS, snapshot_grads=bad)
  helpers.assert_equal(updates, jax.tree.map(lambda g: -0.1 * g, grads))


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
    helpers.slow(optax_svrg.adaptive_svrg()),
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


SAGA = {
  "alpha": lambda: optax_svrg.alpha_saga(0.5, len(BATCHES)),
  "adaptive": lambda: optax_svrg.adaptive_saga(len(BATCHES)),
}
# Where a SAGA transformation may hide; update needs no second gradient there.
SAGA_WRAPPERS = {
  name: wrap for name, wrap in WRAPPERS.items() if name != "inject_hyperparams"
}
MASK = {"layer": {"w": True, "b": False}, "scale": True}


def saga_state(opt_state) -> optax_svrg.SAGAState:
  is_state = lambda x: isinstance(x, optax_svrg.SAGAState)
  (state,) = filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))
  return state


def saga_grads(step):
  """A batch_index and gradients that differ at each visit."""
  i = step % len(BATCHES)
  return i, GRAD(helpers.perturbed(PARAMS, 0.02 * step), BATCHES[i])


@pytest.mark.parametrize("kind", ["adaptive", helpers.slow("alpha")])
class TestSAGA:
  """The transformations with a table, where alpha_svrg is tested above."""

  @staticmethod
  def run(tx, steps=9, params=PARAMS):
    """Updates of steps in turn over the batches, at given gradients."""
    step = jax.jit(
      lambda g, s, i: tx.update(g, s, params, batch_index=i, value=1.0)
    )
    state, history = tx.init(params), []
    for k in range(steps):
      i, grads = saga_grads(k)
      updates, state = step(grads, state, i)
      history.append(updates)
    return history, state

  @pytest.mark.parametrize(
    "name",
    ["adamw", *map(helpers.slow, ("clip_by_global_norm", "schedule_free"))],
  )
  def test_the_optimizer_sees_the_corrected_gradient(self, kind, name):
    corrected, _ = self.run(SAGA[kind]())
    tx = optax.chain(SAGA[kind](), OPTIMIZERS[name]())
    got, state = self.run(tx)
    reference = optax.with_extra_args_support(OPTIMIZERS[name]())
    update = jax.jit(lambda g, s: reference.update(g, s, PARAMS))
    want_state = reference.init(PARAMS)
    for updates, grads in zip(got, corrected, strict=True):
      want, want_state = update(grads, want_state)
      chex.assert_trees_all_close(updates, want, rtol=1e-4, atol=1e-6)
    assert saga_state(state).alpha > 0

  @pytest.mark.parametrize(
    "name", names(SAGA_WRAPPERS, "chain", "conditionally_transform")
  )
  def test_wrappers_pass_the_index_on(self, kind, name):
    tx = SAGA_WRAPPERS[name](SAGA[kind]())
    _, state = self.run(tx, steps=18)
    saga = saga_state(state)
    # MultiSteps makes an update of every second gradient.
    visits = {"MultiSteps": 9, "conditionally_transform": 10}.get(name, 18)
    assert saga.count == visits
    assert saga.is_filled.all()
    alpha = optax.tree.get(state, "alpha")
    # What momentum or accumulation makes of gradients is not worth correcting.
    if kind == "alpha":
      assert alpha == 0.5
    elif name not in ("chain", "MultiSteps"):
      assert 0 < alpha < 1

  def test_gradient_accumulation(self, kind):
    """MultiSteps after the correction averages corrected gradients."""
    corrected, _ = self.run(SAGA[kind]())
    tx = optax.chain(
      SAGA[kind](),
      optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation(),
    )
    updates, _ = self.run(tx)
    want = jax.tree.map(lambda *g: -sum(g) / 3, *corrected[-3:])
    chex.assert_trees_all_close(updates[-1], want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(updates[-2], jax.tree.map(jnp.zeros_like, want))

  def test_masked(self, kind):
    """What is masked out passes; the rest is corrected as if it were all."""
    masked, state = self.run(optax.masked(SAGA[kind](), MASK))
    assert saga_state(state).table["layer"]["b"] == optax.MaskedNode()
    tx = SAGA[kind]()
    part = lambda tree: (tree["layer"]["w"], tree["scale"])
    want_state = tx.init(part(PARAMS))
    update = jax.jit(lambda g, s, i: tx.update(g, s, batch_index=i))
    for k, updates in enumerate(masked):
      i, grads = saga_grads(k)
      want, want_state = update(part(grads), want_state, i)
      chex.assert_trees_all_close(part(updates), want, rtol=1e-5, atol=1e-7)
      helpers.assert_equal(updates["layer"]["b"], grads["layer"]["b"])
    assert want_state.alpha > 0

  @pytest.mark.parametrize(
    "mask_compatible_extra_args", [False, helpers.slow(True)]
  )
  def test_partition(self, kind, mask_compatible_extra_args):
    tx = optax.partition(
      {
        "matrix": SAGA[kind](),
        "rest": optax.chain(optax_svrg.alpha_saga(1.0, 3), optax.sgd(0.1)),
      },
      labels,
      mask_compatible_extra_args=mask_compatible_extra_args,
    )
    got, state = self.run(tx)
    assert isinstance(
      state.inner_states["matrix"].inner_state, optax_svrg.SAGAState
    )
    own, rest = SAGA[kind](), optax_svrg.alpha_saga(1.0, 3)
    pick = lambda tree: (tree["layer"]["b"], tree["scale"])
    states = own.init(PARAMS["layer"]["w"]), rest.init(pick(PARAMS))

    @jax.jit
    def update(grads, states, i):
      w, r = grads["layer"]["w"], pick(grads)
      w, own_state = own.update(w, states[0], batch_index=i)
      r, rest_state = rest.update(r, states[1], batch_index=i)
      return w, r, (own_state, rest_state)

    for k, updates in enumerate(got):
      i, grads = saga_grads(k)
      w, r, states = update(grads, states, i)
      chex.assert_trees_all_close(
        (updates["layer"]["w"], pick(updates)),
        (w, jax.tree.map(lambda x: -0.1 * x, r)),
        rtol=1e-5,
        atol=1e-6,
      )

  @pytest.mark.parametrize("table_dtype", ["bfloat16", helpers.slow(None)])
  def test_inject_hyperparams(self, kind, table_dtype):
    """The coefficients are numbers to it; the size of the table is not."""
    factory = {
      "alpha": optax_svrg.alpha_saga,
      "adaptive": optax_svrg.adaptive_saga,
    }[kind]
    numbers = (
      {"alpha": 0.5} if kind == "alpha" else {"decay": 0.5, "max_alpha": 0.75}
    )
    kwargs = {"num_batches": 3, "table_dtype": table_dtype}
    tx = optax.inject_hyperparams(
      factory, static_args=("num_batches", "table_dtype")
    )(**numbers, **kwargs)
    got, state = self.run(tx)
    want, want_state = self.run(factory(**numbers, **kwargs))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert saga_state(state).alpha == want_state.alpha > 0
    # The size of the table cannot be an array that may change.
    with pytest.raises(
      TypeError, match=r'num_batches must .*static_args=\("num_batches",\)'
    ):
      optax.inject_hyperparams(factory)(**numbers, **kwargs).init(PARAMS)

  @pytest.mark.parametrize("wrapper", ["MultiSteps", "plain type"])
  def test_wrapper_that_drops_the_argument(self, kind, wrapper):
    if wrapper == "MultiSteps":
      tx = optax.MultiSteps(SAGA[kind](), 2).gradient_transformation()
    else:
      tx = optax.GradientTransformation(*SAGA[kind]())
    tx = optax.chain(tx)
    with pytest.raises(ValueError, match=r"batch_index.*may have dropped"):
      tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch_index=0)

  @pytest.mark.parametrize("inside", [True, helpers.slow(False)])
  def test_apply_if_finite(self, kind, inside):
    """A bad step leaves no trace, whichever comes first."""
    if inside:
      tx = optax.apply_if_finite(optax.chain(SAGA[kind](), optax.sgd(0.1)), 3)
    else:
      tx = optax.chain(SAGA[kind](), optax.apply_if_finite(optax.sgd(0.1), 3))
    _, state = self.run(tx)
    bad = jax.tree.map(lambda g: g * jnp.nan, PARAMS)
    updates, after = tx.update(bad, state, PARAMS, batch_index=1)
    helpers.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    before, saga = saga_state(state), saga_state(after)
    helpers.assert_equal(saga.table, before.table)
    chex.assert_trees_all_close(saga.mean_grads, before.mean_grads, rtol=1e-6)
    i, grads = saga_grads(9)
    updates, _ = tx.update(grads, after, PARAMS, batch_index=i)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert np.any(updates["layer"]["w"] != 0)

  def test_map_params_marks_the_parameter_trees(self, kind):
    """What shardings of the state are derived with."""
    tx = optax.chain(SAGA[kind](), optax.adam(1e-3))
    state = optax.tree.map_params(
      tx,
      lambda _: "param",
      tx.init(PARAMS),
      transform_non_params=lambda _: "other",
    )
    marked = jax.tree.map(lambda _: "param", PARAMS)
    want = optax_svrg.SAGAState(
      count="other",
      alpha="other",
      is_filled="other",
      table=marked,
      mean_grads=marked,
      mean_error=marked,
      estimate=None if kind == "alpha" else ("other",) * 5,
    )
    assert state[0] == want

  @pytest.mark.parametrize("table_dtype", [jnp.bfloat16, helpers.slow(None)])
  def test_checkpoint(self, kind, table_dtype, tmp_path):
    """A run that was saved within an epoch goes on to the last bit."""
    if kind == "alpha":
      transform = optax_svrg.alpha_saga(0.5, 3, table_dtype=table_dtype)
    else:
      transform = optax_svrg.adaptive_saga(3, table_dtype=table_dtype)
    tx = optax.chain(transform, optax.adam(1e-2))

    @jax.jit
    def train_step(params, state, batch, i):
      updates, state = tx.update(
        GRAD(params, batch), state, params, batch_index=i
      )
      return optax.apply_updates(params, updates), state

    saved = PARAMS, tx.init(PARAMS)
    for k in range(8):
      saved = train_step(*saved, BATCHES[k % 3], k % 3)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "state", saved)
      checkpointer.wait_until_finished()
      like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
      restored = checkpointer.restore(tmp_path / "state", like)
    helpers.assert_equal(restored, saved)
    for k in range(8, 12):
      saved, restored = (
        train_step(*x, BATCHES[k % 3], k % 3) for x in (saved, restored)
      )
    helpers.assert_equal(restored, saved)
    assert saved[1][0].alpha > 0
