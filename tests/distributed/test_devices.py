# SPDX-License-Identifier: Apache-2.0
"""Eight devices: shard_map, pmap, vmap and sharded jit.

The number of devices is fixed when JAX starts, so the tests of this file run in
a process of their own, which the first of them starts.
"""

import os
import re
import subprocess
import sys

from flax import jax_utils
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_svrg
from tests import helpers

FLAG = "--xla_force_host_platform_device_count=8"
CHILD = FLAG in os.environ.get("XLA_FLAGS", "")
eight_devices = pytest.mark.skipif(not CHILD, reason="runs in its own process")


def run_with_eight_devices(tier):
  """Runs the tests of this file, those that a marker expression selects."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
  result = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", __file__, "-q"),
      *("-o", "addopts=", "-m", tier, "--durations=10"),
    ],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert re.search(r"\d\d passed, 1 skipped", result.stdout), result.stdout


@pytest.mark.skipif(CHILD, reason="this is the process")
def test_in_a_process_with_eight_devices():
  run_with_eight_devices("not slow")


@pytest.mark.slow
@pytest.mark.skipif(CHILD, reason="this is the process")
def test_the_rest_in_a_process_with_eight_devices():
  run_with_eight_devices("slow")


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 32, 16)).astype(np.float32)
Y = RNG.normal(size=(2, 32, 8)).astype(np.float32)
BATCHES = tuple(zip(X, Y, strict=True))
PARAMS = {"w": RNG.normal(size=(16, 8)).astype(np.float32)}


def loss(params, batch):
  x, y = batch
  return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)


GRAD = jax.grad(loss)


def train(tx, params, batches, *, grad=GRAD, axis_name=None):
  """A snapshot, then a step on each batch away from it."""
  state = optax_svrg.take_snapshot(
    tx.init(params),
    params,
    lambda p: optax_svrg.mean_gradient(grad, p, batches, axis_name=axis_name),
  )
  history = []
  for batch in batches:
    grad_fn = lambda p, b=batch: grad(p, b)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    params = optax.apply_updates(params, updates)
    history.append(updates)
  return params, state, history


def make(axis_name=None, alpha=0.75):
  return optax.chain(
    optax_svrg.alpha_svrg(alpha, axis_name=axis_name), optax.sgd(0.1)
  )


# The gradient of this device's part of a batch.
local_grad = optax_svrg.device_local(GRAD, "data")


# To map over devices.
AXIS_TYPES = [AxisType.Explicit, helpers.slow(AxisType.Auto)]
WAYS = ["shard_map", helpers.slow("unchecked"), "pmap", helpers.slow("vmap")]


def make_mesh(axis_type=AxisType.Auto):
  return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def two_axes(axis_type=AxisType.Auto):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture
def want():
  """What one device does with whole batches."""
  return jax.jit(lambda p, b: train(make(), p, b))(PARAMS, BATCHES)


@eight_devices
class TestAxisName:
  @pytest.mark.parametrize(
    ("alpha", "check_vma"),
    [
      (0.75, True),
      *(
        helpers.slow(alpha, check_vma)
        for alpha in (0, 0.0 * jnp.ones(()), 0.75)
        for check_vma in (False, True)
      ),
    ],
  )
  def test_shard_map(self, check_vma, alpha):
    sharded = jax.jit(
      jax.shard_map(
        lambda p, b: train(
          make("data", alpha),
          p,
          b,
          grad=local_grad if check_vma else GRAD,
          axis_name="data",
        ),
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
      )
    )
    want = jax.jit(lambda p, b: train(make(None, alpha), p, b))(PARAMS, BATCHES)
    helpers.assert_close(sharded(PARAMS, BATCHES), want, rtol=1e-5, atol=1e-7)

  def test_snapshot_grads(self, want):
    def step(params, state, batch):
      grads = local_grad(params, batch)
      return make("data").update(
        grads,
        state,
        params,
        snapshot_grads=local_grad(state[0].snapshot_params, batch),
      )[0]

    params = helpers.perturbed(PARAMS)
    state = optax_svrg.take_snapshot(
      make().init(PARAMS), PARAMS, lambda p: GRAD(p, BATCHES[0])
    )
    got = jax.jit(
      jax.shard_map(
        step,
        mesh=make_mesh(),
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
      )
    )(params, state, BATCHES[0])
    grad_fn = lambda p: GRAD(p, BATCHES[0])
    want, _ = make().update(grad_fn(params), state, grad_fn=grad_fn)
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-7)

  def test_pmap(self, want):
    split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
    got = jax.pmap(
      lambda p, b: train(make("data"), p, b, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0),
    )(PARAMS, split)
    for i in (0, 7):
      helpers.assert_close(
        jax.tree.map(lambda x, i=i: x[i], got), want, rtol=1e-5, atol=1e-7
      )

  def test_replicated_for_pmap(self, want):
    """States and parameters with an axis of devices, outside of pmap too."""
    split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
    tx = make("data")
    params, state = jax_utils.replicate((PARAMS, tx.init(PARAMS)))
    mean = jax.pmap(
      lambda p, b: optax_svrg.mean_gradient(GRAD, p, b, axis_name="data"),
      axis_name="data",
    )
    state = optax_svrg.take_snapshot(state, params, lambda p: mean(p, split))

    def step(params, state, batch):
      grad_fn = lambda p: GRAD(p, batch)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      return optax.apply_updates(params, updates), state

    step = jax.pmap(step, axis_name="data")
    for batch in split:
      params, state = step(params, state, batch)
    got = jax_utils.unreplicate((params, state[0].mean_grads))
    helpers.assert_close(
      got, (want[0], want[1][0].mean_grads), rtol=1e-5, atol=1e-7
    )
    assert optax_svrg.summary(state)["alpha"] == 0.75

  @pytest.mark.parametrize("check_vma", [True, helpers.slow(False)])
  def test_weights_over_devices(self, check_vma):
    """Of padded batches, of which a device may have nothing that is valid."""
    x = RNG.normal(size=(2, 16, 3)).astype(np.float32)
    valid = np.ones((2, 16), np.float32)
    valid[:, 4:8] = 0
    valid[1, 13] = 0

    def mean_of(axis_name):
      def grad(params, batch):
        x, mask = batch
        return params + mask @ x / mask.sum()

      return lambda p, b: optax_svrg.mean_gradient(
        grad, p, b, weights=lambda b: b[1].sum(), axis_name=axis_name
      )

    vary = optax_svrg.device_local(mean_of("data"), "data")
    mapped = jax.shard_map(
      vary if check_vma else mean_of("data"),
      mesh=make_mesh(),
      in_specs=(P(), P("data")),
      out_specs=P(),
      check_vma=check_vma,
    )
    batches = tuple(zip(x, valid, strict=True))
    got = jax.jit(mapped)(jnp.zeros(3), batches)
    want = np.average(x.reshape(-1, 3), axis=0, weights=valid.ravel())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_vmap(self, want):
    split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
    got = jax.jit(
      jax.vmap(
        lambda p, b: train(make("data"), p, b, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0),
      )
    )(PARAMS, split)
    helpers.assert_close(
      jax.tree.map(lambda x: x[3], got), want, rtol=1e-5, atol=1e-7
    )

  def test_one_reduction_per_step_and_per_pass(self):
    specs = {"mesh": make_mesh(), "out_specs": P()}

    def step(params, state, batch):
      grad_fn = lambda p: local_grad(p, batch)
      return make("data").update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )

    def mean(params, batches):
      return optax_svrg.mean_gradient(
        local_grad, params, batches, axis_name="data"
      )

    state = make().init(PARAMS)
    for fn, args in (
      (
        jax.shard_map(step, in_specs=(P(), P(), P("data")), **specs),
        (PARAMS, state, BATCHES[0]),
      ),
      (
        jax.shard_map(mean, in_specs=(P(), P("data")), **specs),
        (PARAMS, BATCHES),
      ),
    ):
      text = jax.jit(fn).lower(*args).compile().as_text()
      reduced = re.findall(r"= (\S+) all-reduce(?:-start)?\(", text)
      assert [shape.split("{")[0] for shape in reduced] == ["f32[16,8]"]


@eight_devices
class TestAdaptive:
  """The estimate over the gradients of all devices."""

  @staticmethod
  def run(tx, params, batches, grad, axis_name=None):
    """Two steps away from the snapshot; the last updates and the state."""
    state = optax_svrg.take_snapshot(
      tx.init(params),
      params,
      lambda p: optax_svrg.mean_gradient(grad, p, batches, axis_name=axis_name),
    )
    params = jax.tree.map(lambda p: p * 1.5, params)
    for batch in batches:
      grad_fn = lambda p, b=batch: grad(p, b)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
    return updates, state

  @staticmethod
  def want():
    """The formulas by hand, from the gradients of the eight parts."""
    batches = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
    point = jax.tree.map(lambda p: p * 1.5, PARAMS)
    parts = lambda p, b: np.asarray(jax.vmap(GRAD, (None, 0))(p, b)["w"], float)
    g, s = (np.stack([parts(p, b) for b in batches]) for p in (point, PARAMS))
    mean = s.mean(axis=(0, 1))
    covariance = np.sum((g[0] - mean) * (s[0] - mean)) / 8
    variance = np.sum((s[0] - mean) ** 2) / 8
    alpha = np.clip(covariance / variance, 0, 1)
    # Averages over both steps, the mean over eight devices varying less.
    averages = np.zeros(3)
    for a, g_parts, s_parts in zip((1, alpha), g, s, strict=True):
      corrected = g_parts.mean(axis=0) - a * (s_parts.mean(axis=0) - mean)
      products = (
        np.sum((g_parts - mean) * (s_parts - mean)) / 8 / 8,
        np.sum((s_parts - mean) ** 2) / 8 / 8,
        np.sum((corrected - mean) ** 2),
      )
      averages = 0.97 * averages + 0.03 * np.array(products)
    c, v, moment = averages
    ratio = moment / (moment + alpha * (2 * c - alpha * v))
    return corrected, alpha, ratio

  @pytest.mark.parametrize("kind", WAYS)
  def test_values(self, kind):
    tx = optax_svrg.adaptive_svrg(axis_name="data")
    grad = local_grad if kind == "shard_map" else GRAD
    fn = lambda p, b: self.run(tx, p, b, grad, "data")
    split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
    if kind in ("pmap", "vmap"):
      make_mapped = jax.pmap if kind == "pmap" else jax.vmap
      mapped = make_mapped(fn, axis_name="data", in_axes=(None, 0))
      every = mapped(PARAMS, split)
      updates, state = jax.tree.map(lambda x: x[5], every)
      for leaf in jax.tree.leaves(every):
        assert np.all(np.asarray(leaf) == np.asarray(leaf[:1]))
    else:
      updates, state = jax.jit(
        jax.shard_map(
          fn,
          mesh=make_mesh(),
          in_specs=(P(), P("data")),
          out_specs=P(),
          check_vma=kind == "shard_map",
        )
      )(PARAMS, BATCHES)
    want, alpha, ratio = self.want()
    assert 0 < alpha < 1
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.estimate.variance_ratio, ratio, rtol=1e-4)

  def test_two_scalars_join_the_reduction(self):
    tx = optax_svrg.adaptive_svrg(axis_name="data")

    def step(params, state, batch):
      grad_fn = lambda p: local_grad(p, batch)
      return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    fn = jax.shard_map(
      step,
      mesh=make_mesh(),
      in_specs=(P(), P(), P("data")),
      out_specs=P(),
    )
    text = jax.jit(fn).lower(PARAMS, tx.init(PARAMS), BATCHES[0])
    reduced = re.findall(
      r"= (.*?) all-reduce(?:-start)?\(", text.compile().as_text()
    )
    shapes = sorted(re.findall(r"\w+\[[\d,]*\]", " ".join(reduced)))
    assert shapes == ["f32[16,8]", "f32[]", "f32[]"]

  @pytest.mark.parametrize("axis_type", AXIS_TYPES)
  def test_sharded_jit(self, axis_type):
    """Global gradients: the estimate of one device with whole batches."""
    mesh = make_mesh(axis_type)
    tx = optax_svrg.adaptive_svrg()
    fn = jax.jit(lambda p, b: self.run(tx, p, b, GRAD))
    want = fn(PARAMS, BATCHES)
    with jax.set_mesh(mesh):
      params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
      batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data")))
      got = fn(params, batches)
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-7)


METHODS = {
  "alpha_svrg": lambda **kwargs: optax_svrg.alpha_svrg(0.75, **kwargs),
  "adaptive_svrg": optax_svrg.adaptive_svrg,
  "alpha_saga": lambda **kwargs: optax_svrg.alpha_saga(0.75, 2, **kwargs),
  "adaptive_saga": lambda **kwargs: optax_svrg.adaptive_saga(2, **kwargs),
}


class Waves:
  """Gradients of batches by scalars, so that every placement is allowed."""

  PARAMS = {  # noqa: RUF012
    "w": RNG.normal(size=(8, 8)).astype(np.float32),
    "b": np.linspace(-1, 1, 3, dtype=np.float32),
  }
  PHASES = np.linspace(0, 2, 2, dtype=np.float32)

  @staticmethod
  def grad(params, phase):
    return jax.tree.map(lambda p: jnp.sin(p + phase) + phase * p, params)

  @classmethod
  def train(cls, tx, params, phases, axis_name=None):
    """Updates after a snapshot and steps over both batches in turn."""
    state = tx.init(params)
    if isinstance(state, optax_svrg.SVRGState):
      state = optax_svrg.take_snapshot(
        state,
        params,
        lambda p: optax_svrg.mean_gradient(
          lambda q, b: cls.grad(q, jnp.mean(b)),
          p,
          phases.reshape(2, 1),
          axis_name=axis_name,
        ),
      )

    def step(carry, index):
      params, state = carry
      grad_fn = lambda p: cls.grad(p, phases[index])
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn, batch_index=index
      )
      params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
      return (params, state), None

    (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(5) % 2)
    return params, state.alpha

  @classmethod
  def want(cls, method):
    run = jax.jit(lambda p, x: cls.train(METHODS[method](), p, x))
    want = run(cls.PARAMS, cls.PHASES)
    assert want[1] > 0
    return want


def placements(fast):
  """Methods, types of mesh and specifications; the product is slow."""
  specs = [
    *(P(), P("a"), P("b"), P(None, "a"), P(None, "b"), P("a", "b")),
    *(P("b", "a"), P(("a", "b")), P(None, ("a", "b"))),
  ]
  return [
    (method, axis_type, spec)
    if (method, spec) == fast and axis_type == AxisType.Explicit
    else helpers.slow(method, axis_type, spec)
    for method in METHODS
    for axis_type in (AxisType.Auto, AxisType.Explicit)
    for spec in specs
  ]


@eight_devices
class TestPlacements:
  """Every method, on meshes of every type, with parameters split anyhow."""

  @pytest.mark.parametrize(
    ("method", "axis_type", "spec"),
    placements(("adaptive_svrg", P(None, "b"))),
  )
  def test_global_arrays(self, method, axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    want = Waves.want(method)
    with jax.set_mesh(mesh):
      params = {
        "w": jax.device_put(Waves.PARAMS["w"], NamedSharding(mesh, spec)),
        "b": jax.device_put(Waves.PARAMS["b"], NamedSharding(mesh, P())),
      }
      run = jax.jit(lambda p, x: Waves.train(METHODS[method](), p, x))
      got = run(params, Waves.PHASES)
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize(
    ("method", "axis_type", "spec"),
    [
      (method, axis_type, spec)
      if (method, spec) == ("adaptive_saga", P(None, "b"))
      and axis_type == AxisType.Explicit
      else helpers.slow(method, axis_type, spec)
      for method in METHODS
      for axis_type in (AxisType.Auto, AxisType.Explicit)
      for spec in (P(), P("b"), P(None, "b"))
    ],
  )
  def test_partly_manual(self, method, axis_type, spec):
    """Batches are split by hand, parameters by the compiler."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    want = Waves.want(method)
    tx = METHODS[method](axis_name="a")

    def train(params, phases):
      varying = jax.lax.pcast(phases, "a", to="varying")
      return Waves.train(tx, params, varying, axis_name="a")

    with jax.set_mesh(mesh):
      params = {
        "w": jax.device_put(Waves.PARAMS["w"], NamedSharding(mesh, spec)),
        "b": jax.device_put(Waves.PARAMS["b"], NamedSharding(mesh, P())),
      }
      fn = jax.shard_map(
        train, in_specs=(P(), P()), out_specs=P(), axis_names={"a"}
      )
      got = jax.jit(fn)(params, jnp.asarray(Waves.PHASES))
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-6)


@eight_devices
class TestShardAxisName:
  """Parameters that are shards of larger ones inside shard_map."""

  @pytest.mark.parametrize(
    ("method", "check_vma"),
    [
      ("adaptive_svrg", True),
      helpers.slow("adaptive_svrg", False),
      *(
        helpers.slow(m, c)
        for m in METHODS
        if m != "adaptive_svrg"
        for c in (True, False)
      ),
    ],
  )
  def test_all_shards_share_one_coefficient(self, method, check_vma):
    want = Waves.want(method)
    tx = METHODS[method](shard_axis_name="data")
    # Without types that track it, all arrays count as shards.
    specs = {"w": P("data"), "b": P()}
    params, want = dict(Waves.PARAMS), (dict(want[0]), want[1])
    if not check_vma:
      specs["b"] = P("data")
      params["b"] = np.linspace(-1, 1, 8, dtype=np.float32)
      run = jax.jit(lambda p, x: Waves.train(METHODS[method](), p, x))
      want = run(params, Waves.PHASES)
    fn = jax.shard_map(
      lambda p, x: Waves.train(tx, p, x),
      mesh=make_mesh(),
      in_specs=(specs, P()),
      out_specs=(specs, P()),
      check_vma=check_vma,
    )
    got = jax.jit(fn)(params, Waves.PHASES)
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize("source", ["svrg", helpers.slow("saga")])
  def test_all_shards_fall_back_together(self, source):
    """Where the corrected gradient of one of them would not be finite."""
    tx = METHODS[f"alpha_{source}"](shard_axis_name="data")
    large = np.ones(8, np.float32)
    large[3] = np.finfo(np.float32).max

    def step(grads):
      state = tx.init(grads)
      opposite = jax.tree.map(jnp.negative, grads)
      zeros = jax.tree.map(jnp.zeros_like, grads)
      if source == "svrg":
        state = optax_svrg.take_snapshot(state, grads, lambda p: zeros)
      else:
        for index, stored in ((0, opposite), (1, zeros)):
          _, state = tx.update(stored, state, batch_index=index)
      return tx.update(grads, state, snapshot_grads=opposite, batch_index=0)

    spec = P("data")
    state_spec = jax.tree.map(
      lambda x: (
        P(*[None] * (x.ndim - 1), "data") if x.shape[-1:] == (8,) else P()
      ),
      jax.eval_shape(METHODS[f"alpha_{source}"]().init, large),
    )
    fn = jax.shard_map(
      step, mesh=make_mesh(), in_specs=spec, out_specs=(spec, state_spec)
    )
    updates, state = jax.jit(fn)(large)
    np.testing.assert_array_equal(updates, large)
    assert state.alpha == 0


@eight_devices
class TestDeviceLocal:
  @staticmethod
  def want():
    parts = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES[0])
    return parts, jax.vmap(GRAD, (None, 0))(PARAMS, parts)["w"]

  @pytest.mark.parametrize("how", WAYS)
  def test_gradients_of_each_device(self, how):
    parts, want = self.want()
    grad = optax_svrg.device_local(GRAD, "data")
    if how in ("pmap", "vmap"):
      mapped = jax.pmap if how == "pmap" else jax.vmap
      got = mapped(grad, in_axes=(None, 0), axis_name="data")(PARAMS, parts)
    else:
      got = jax.jit(
        jax.shard_map(
          lambda p, b: jax.tree.map(lambda g: g[None], grad(p, b)),
          mesh=make_mesh(),
          in_specs=(P(), P("data")),
          out_specs=P("data"),
          check_vma=how == "shard_map",
        )
      )(PARAMS, BATCHES[0])
    # A sum that is formed elsewhere, rounded as its largest terms are.
    np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-6)

  def test_some_parameters_vary_already_over_some_axes(self):
    """E.g. adapters that each group of devices has for itself."""
    mesh = jax.make_mesh(
      (2, 4), ("group", "data"), axis_types=(AxisType.Auto,) * 2
    )
    grad = optax_svrg.device_local(
      jax.value_and_grad(lambda p, x: jnp.sum(p["own"] * p["all"] * x)),
      ("group", "data"),
    )

    def step(own, every, x):
      value, grads = grad({"own": own, "all": every}, x)
      return value[None], jax.tree.map(lambda g: g.reshape(1), grads)

    value, grads = jax.jit(
      jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("group"), P(), P(("group", "data"))),
        out_specs=P(("group", "data")),
      )
    )(jnp.array([2.0, 3.0]), jnp.array([5.0]), jnp.arange(8.0))
    own = np.repeat([2.0, 3.0], 4)
    np.testing.assert_allclose(grads["own"], 5 * np.arange(8))
    np.testing.assert_allclose(grads["all"], own * np.arange(8))
    np.testing.assert_allclose(value, 5 * own * np.arange(8))

  def test_errors(self):
    with pytest.raises(TypeError, match="fn must be a function, got 3"):
      optax_svrg.device_local(3, "data")
    with pytest.raises(ValueError, match="axis_name='rows' is not an axis of"):
      optax_svrg.device_local(GRAD, "rows")(PARAMS, BATCHES[0])


@eight_devices
class TestFaults:
  """Snapshot gradients that are not finite, of one device and of all."""

  @staticmethod
  def make(method, axis_name=None):
    if method == "alpha":
      return optax_svrg.alpha_svrg(0.75, axis_name=axis_name)
    return optax_svrg.adaptive_svrg(decay=0.9, axis_name=axis_name)

  @pytest.mark.parametrize(
    ("method", "bad"),
    [
      ("adaptive", np.nan),
      helpers.slow("alpha", np.nan),
      helpers.slow("adaptive", np.inf),
    ],
  )
  def test_a_device_that_fails_is_plain(self, method, bad):
    tx = self.make(method, "data")

    def step(params, batch, factor):
      state = optax_svrg.take_snapshot(
        tx.init(params),
        params,
        lambda p: optax_svrg.mean_gradient(
          local_grad, p, [batch], axis_name="data"
        ),
      )
      point = jax.tree.map(lambda p: 1.5 * p, params)
      grads = local_grad(point, batch)
      s = jax.tree.map(lambda x: factor * x, local_grad(params, batch))
      updates, state = tx.update(grads, state, snapshot_grads=s)
      # Of the second step nothing is bad.
      s = local_grad(params, batch)
      second, state = tx.update(grads, state, snapshot_grads=s)
      return updates, second, state

    factors = np.ones((8, 1), np.float32)
    factors[3] = bad
    fn = jax.jit(
      jax.shard_map(
        step,
        mesh=make_mesh(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
      )
    )
    updates, second, state = fn(PARAMS, BATCHES[0], factors)
    parts = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES[0])
    g, s = (
      np.asarray(jax.vmap(GRAD, (None, 0))({"w": f * PARAMS["w"]}, parts)["w"])
      for f in (1.5, 1.0)
    )
    corrected = g - (0.75 if method == "alpha" else 1.0) * (s - s.mean(axis=0))
    corrected[3] = g[3]
    np.testing.assert_allclose(
      updates["w"], corrected.mean(axis=0), rtol=1e-5, atol=1e-7
    )
    assert np.all(np.isfinite(helpers.flat((second, state))))

  @pytest.mark.parametrize("axis_type", AXIS_TYPES)
  @pytest.mark.parametrize("method", ["adaptive", helpers.slow("alpha")])
  @pytest.mark.parametrize("of_mean", [True, helpers.slow(False)])
  def test_sharded_jit(self, method, axis_type, of_mean):
    """A bad number lies on one device only, and all know of it."""
    mesh = make_mesh(axis_type)
    tx = self.make(method)
    bad = np.ones((16, 8), np.float32)
    bad[5, 2] = np.nan
    with jax.set_mesh(mesh):
      put = lambda x: jax.device_put(
        {"w": x}, NamedSharding(mesh, P("data", None))
      )
      grads, s, broken = put(PARAMS["w"]), put(2 * PARAMS["w"]), put(bad)
      state = tx.init(grads)

      @jax.jit
      def run(state, grads, s, mean):
        state = optax_svrg.take_snapshot(state, grads, lambda p: mean)
        return tx.update(grads, state, snapshot_grads=s)

      if of_mean:
        updates, state = run(state, grads, s, broken)
      else:
        updates, state = run(state, grads, broken, s)
    helpers.assert_equal(updates, grads)
    assert updates["w"].sharding.is_equivalent_to(grads["w"].sharding, 2)
    assert bool(state.is_finite) != of_mean


@eight_devices
class TestAxisNameMisuse:
  @staticmethod
  def run(fn, mesh_axis="data"):
    mesh = jax.make_mesh((8,), (mesh_axis,), axis_types=(AxisType.Auto,))
    return jax.jit(
      jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(mesh_axis)), out_specs=P())
    )(PARAMS, BATCHES[0])

  @pytest.mark.parametrize("summed", ["updates", "snapshot_grads", "grad_fn"])
  def test_gradients_that_were_summed(self, summed):
    """jax.grad inside shard_map has summed over the devices already."""

    def step(params, batch):
      pick = lambda name: GRAD if name == summed else local_grad
      tx = make("data")
      if summed == "snapshot_grads":
        extra = {"snapshot_grads": pick("snapshot_grads")(params, batch)}
      else:
        extra = {"grad_fn": lambda p: pick("grad_fn")(p, batch)}
      grads = pick("updates")(params, batch)
      return tx.update(grads, tx.init(params), params, **extra)[0]

    with pytest.raises(
      ValueError,
      match=rf"{summed} must be device-local .*'data'.* at \['w'\].*pcast",
    ):
      self.run(step)

  def test_mean_gradient_of_summed_gradients(self):
    mean = lambda p, b: optax_svrg.mean_gradient(GRAD, p, [b], axis_name="data")
    with pytest.raises(
      ValueError, match=r"gradients of grad_fn must be device"
    ):
      self.run(mean)

  def test_missing_axis(self):
    def step(params, batch):
      tx = make("data")
      return tx.update(
        params, tx.init(params), params, grad_fn=lambda p: GRAD(p, batch)
      )[0]

    message = r"axis_name='data' is not an axis of the enclosing"
    with pytest.raises(ValueError, match=message):
      self.run(step, "other")
    with pytest.raises(ValueError, match=message):
      step(PARAMS, BATCHES[0])
    with pytest.raises(ValueError, match=message):
      optax_svrg.mean_gradient(GRAD, PARAMS, BATCHES, axis_name="data")


@eight_devices
class TestDiagnostics:
  @pytest.fixture
  def want(self):
    return optax_svrg.per_example_grads(loss)(PARAMS, BATCHES[0])

  @pytest.mark.parametrize("chunk_size", [3, *map(helpers.slow, (None, 1))])
  @pytest.mark.parametrize("check_vma", [True, helpers.slow(False)])
  def test_shard_map(self, want, check_vma, chunk_size):
    """No example is mixed with those of other devices."""
    grads = jax.jit(
      jax.shard_map(
        optax_svrg.per_example_grads(loss, chunk_size=chunk_size),
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
      )
    )
    got = grads(PARAMS, BATCHES[0])
    helpers.assert_close(got, want, rtol=1e-6)
    text = grads.lower(PARAMS, BATCHES[0]).compile().as_text()
    assert not re.search(r"all-reduce|all-gather|collective", text)

  def test_shard_map_with_a_closure_over_examples(self, want):
    """The batch, indices, is the same on all devices; the loss is not."""

    def grads(params, examples):
      own_loss = lambda p, i: loss(p, jax.tree.map(lambda x: x[i], examples))
      return optax_svrg.per_example_grads(own_loss)(params, jnp.arange(4))

    got = jax.jit(
      jax.shard_map(
        grads,
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
      )
    )(PARAMS, BATCHES[0])
    helpers.assert_close(got, want, rtol=1e-6)

  def test_shard_map_over_the_model(self, want):
    """A loss that is one on all devices has one gradient, summed by jax.grad.

    Columns of the weights are on different devices, examples on all.
    """
    specs = {"w": P(None, "data"), "scale": P()}

    def own_loss(params, batch):
      x, y = batch
      y = jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index("data"), 1, 1)
      out = jnp.tanh(params["scale"] * (x @ params["w"]))
      return jax.lax.pmean(jnp.mean((out - y) ** 2), "data")

    got = jax.jit(
      jax.shard_map(
        optax_svrg.per_example_grads(own_loss, chunk_size=5),
        mesh=make_mesh(),
        in_specs=(specs, P()),
        out_specs={"w": P(None, None, "data"), "scale": P()},
      )
    )({**PARAMS, "scale": jnp.ones(())}, BATCHES[0])
    scaled = lambda p, b: loss({"w": p["scale"] * p["w"]}, b)
    want = optax_svrg.per_example_grads(scaled)(
      {**PARAMS, "scale": jnp.ones(())}, BATCHES[0]
    )
    helpers.assert_close(got, want, rtol=1e-5)

  @pytest.mark.slow
  @pytest.mark.parametrize("chunk_size", [None, 3])
  def test_pmap(self, want, chunk_size):
    split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES[0])
    grads = optax_svrg.per_example_grads(loss, chunk_size=chunk_size)
    got = jax.pmap(grads, axis_name="data", in_axes=(None, 0))(PARAMS, split)
    got = jax.tree.map(lambda x: x.reshape(32, 16, 8), got)
    helpers.assert_close(got, want, rtol=1e-6)

  @pytest.mark.slow
  @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
  def test_sharded_jit(self, want, axis_type):
    mesh = make_mesh(axis_type)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCHES[0], NamedSharding(mesh, P("data")))

    def measures(params, batch):
      grads = optax_svrg.per_example_grads(loss)(params, batch)
      halves = jax.tree.map(lambda g: 0.5 * g + 1, grads)
      gathered = grads
      if axis_type == AxisType.Explicit:
        # There a product of two arrays that are both split is ambiguous.
        gathered = {"w": jax.sharding.reshard(grads["w"], P())}
      return (
        grads,
        optax_svrg.gradient_variance(gathered),
        optax_svrg.optimal_alpha(grads, halves),
        optax_svrg.optimal_alpha(grads, halves, per="tree"),
      )

    with jax.set_mesh(mesh):
      got = jax.jit(measures)(params, batch)
    assert got[0]["w"].sharding.spec[0] == "data"
    helpers.assert_close(got[0], want, rtol=1e-6)
    helpers.assert_close(
      got[1:],
      (
        optax_svrg.gradient_variance(want),
        {"w": jnp.full((16, 8), 2.0)},
        jnp.array(2.0),
      ),
      rtol=1e-5,
    )

  def test_running_moments(self):
    """Of batches that are spread over the devices."""

    def moments(params, batches, grad):
      state = optax_svrg.RunningMoments.create(params)
      for batch in batches:
        snapshot_grads = grad(jax.tree.map(lambda p: 0.9 * p, params), batch)
        state = state.update(grad(params, batch), snapshot_grads)
      return state, state.optimal_alpha(per="tree")

    mean_grad = lambda p, b: jax.lax.pmean(local_grad(p, b), "data")
    got = jax.jit(
      jax.shard_map(
        lambda p, b: moments(p, b, mean_grad),
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
      )
    )(PARAMS, BATCHES)
    want = jax.jit(lambda p, b: moments(p, b, GRAD))(PARAMS, BATCHES)
    helpers.assert_close(got, want, rtol=1e-5)


SPECS = {"replicated": P(), "fsdp": P("data"), "columns": P(None, "data")}
# On data and model.
TWO_AXES = {
  "tensor": P(None, "model"),
  "tensor and fsdp": P("data", "model"),
}


def fast_placements(*fast, specs=(*SPECS, *TWO_AXES)):
  """Types of mesh and names of specifications; the product is slow."""
  return pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
      (kind, spec) if (kind, spec) in fast else helpers.slow(kind, spec)
      for kind in (AxisType.Auto, AxisType.Explicit)
      for spec in specs
    ],
  )


@eight_devices
@fast_placements(
  (AxisType.Auto, "fsdp"), (AxisType.Explicit, "tensor and fsdp")
)
class TestShardedJit:
  """Without axis_name: global arrays, gradients averaged by the compiler."""

  def put(self, axis_type, spec):
    mesh = two_axes(axis_type) if spec in TWO_AXES else make_mesh(axis_type)
    sharding = NamedSharding(mesh, (SPECS | TWO_AXES)[spec])
    params = jax.device_put(PARAMS, sharding)
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data")))

    def gathered_loss(params, batch):
      # What the compiler does by itself on a mesh of the type Auto.
      if axis_type == AxisType.Explicit:
        params = {"w": jax.sharding.reshard(params["w"], P(None, None))}
      return loss(params, batch)

    return mesh, params, batches, jax.grad(gathered_loss)

  @staticmethod
  def placed_as(tree, params):
    for leaf in jax.tree.leaves(tree):
      assert leaf.sharding.is_equivalent_to(params["w"].sharding, leaf.ndim)

  def test_values_shardings_and_donation(self, axis_type, spec, want):
    mesh, params, batches, grad = self.put(axis_type, spec)
    tx = make()

    with jax.set_mesh(mesh):
      state = tx.init(params)
      svrg = state[0]
      self.placed_as((svrg.snapshot_params, svrg.mean_grads), params)
      mean = jax.jit(lambda p, b: optax_svrg.mean_gradient(grad, p, b))
      state = optax_svrg.take_snapshot(
        state, params, lambda p: mean(p, batches)
      )
      svrg = state[0]
      self.placed_as((svrg.snapshot_params, svrg.mean_grads), params)

      @jax.jit(donate_argnums=(0, 1))
      def step(params, state, batch):
        grad_fn = lambda p: grad(p, batch)
        updates, state = tx.update(
          grad_fn(params), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

      for batch in batches:
        types = jax.tree.map(jax.typeof, state)
        params, state = step(params, state, batch)
        assert jax.tree.map(jax.typeof, state) == types
        svrg = state[0]
        self.placed_as((svrg.snapshot_params, svrg.mean_grads), params)
    helpers.assert_close(
      (params, svrg.mean_grads),
      (want[0], want[1][0].mean_grads),
      rtol=1e-5,
      atol=1e-7,
    )

  def test_snapshot_inside_jit(self, axis_type, spec, want):
    mesh, params, batches, grad = self.put(axis_type, spec)
    with jax.set_mesh(mesh):
      got, state, _ = jax.jit(lambda p, b: train(make(), p, b, grad=grad))(
        params, batches
      )
    helpers.assert_close(
      (got, state[0].mean_grads),
      (want[0], want[1][0].mean_grads),
      rtol=1e-5,
      atol=1e-7,
    )


SAGA = {
  "alpha": lambda **kwargs: optax_svrg.alpha_saga(0.75, 2, **kwargs),
  "adaptive": lambda **kwargs: optax_svrg.adaptive_saga(2, **kwargs),
}


@eight_devices
@pytest.mark.parametrize("kind", ["adaptive", helpers.slow("alpha")])
class TestSAGA:
  """A table of averaged gradients, alike on all devices."""

  @staticmethod
  def train(tx, params, batches, grad=GRAD):
    """Three epochs; the parameters, the state of SAGA, what was applied."""
    tx = optax.chain(tx, optax.sgd(0.1))
    state = tx.init(params)
    history = []
    for k in range(6):
      i = k % 2
      grads = grad(params, batches[i])
      updates, state = tx.update(grads, state, params, batch_index=i)
      params = optax.apply_updates(params, updates)
      history.append(updates)
    # What is left of roundings differs with them.
    return params, state[0]._replace(mean_error=None), history

  def want(self, kind):
    run = lambda p, b: self.train(SAGA[kind](), p, b)
    want = jax.jit(run)(PARAMS, BATCHES)
    assert want[1].alpha > 0
    return want

  @pytest.mark.parametrize("how", WAYS)
  def test_axis_name(self, kind, how):
    want = self.want(kind)
    tx = SAGA[kind](axis_name="data")
    grad = local_grad if how == "shard_map" else GRAD
    fn = lambda p, b: self.train(tx, p, b, grad)
    if how in ("pmap", "vmap"):
      split = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCHES)
      mapped = jax.pmap if how == "pmap" else jax.vmap
      every = mapped(fn, axis_name="data", in_axes=(None, 0))(PARAMS, split)
      for leaf in jax.tree.leaves(every):
        assert np.all(np.asarray(leaf) == np.asarray(leaf[:1]))
      got = jax.tree.map(lambda x: x[5], every)
    else:
      sharded = jax.shard_map(
        fn,
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=how == "shard_map",
      )
      got = jax.jit(sharded)(PARAMS, BATCHES)
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-7)

  def test_one_reduction_per_step(self, kind):
    """Also for the estimate, which is made of what was averaged."""
    tx = SAGA[kind](axis_name="data")

    def step(params, state, batch, i):
      grads = local_grad(params, batch)
      return tx.update(grads, state, params, batch_index=i)

    fn = jax.shard_map(
      step,
      mesh=make_mesh(),
      in_specs=(P(), P(), P("data"), P()),
      out_specs=P(),
    )
    args = (PARAMS, tx.init(PARAMS), BATCHES[0], jnp.array(1))
    text = jax.jit(fn).lower(*args).compile().as_text()
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = re.findall(r"\w+\[[\d,]*\]", " ".join(reduced))
    assert shapes == ["f32[16,8]"]
    assert not re.search(r"all-gather|collective-permute|all-to-all", text)

  def test_gradients_that_were_summed(self, kind):
    tx = SAGA[kind](axis_name="data")

    def step(params, batch):
      grads = GRAD(params, batch)
      return tx.update(grads, tx.init(params), params, batch_index=0)[0]

    with pytest.raises(
      ValueError,
      match=r"updates must be device-local .*'data'.* at \['w'\].*pcast",
    ):
      TestAxisNameMisuse.run(step)
    with pytest.raises(ValueError, match="axis_name='data' is not an axis of"):
      TestAxisNameMisuse.run(step, "other")
    with pytest.raises(ValueError, match="axis_name='data' is not an axis of"):
      step(PARAMS, BATCHES[0])

  @fast_placements((AxisType.Explicit, "columns"), specs=SPECS)
  @pytest.mark.parametrize("jit", [False, helpers.slow(True)])
  def test_sharded_jit(self, kind, axis_type, spec, jit):
    """The table is as sharded as the parameters, over an axis of its own."""
    want = self.want(kind)
    setup = TestShardedJit()
    mesh, params, batches, grad = setup.put(axis_type, spec)
    sharding = params["w"].sharding

    def placed(saga):
      setup.placed_as((saga.mean_grads, saga.mean_error), params)
      (table,) = jax.tree.leaves(saga.table)
      rows = NamedSharding(mesh, P(None, *SPECS[spec]))
      assert table.sharding.is_equivalent_to(rows, 3)

    with jax.set_mesh(mesh):
      if jit:
        run = lambda p, b: self.train(SAGA[kind](), p, b, grad)
        got = jax.jit(run)(params, batches)
        helpers.assert_close(got, want, rtol=1e-5, atol=1e-7)
        return
      tx = optax.chain(SAGA[kind](), optax.sgd(0.1))
      state = tx.init(params)
      placed(state[0])

      @jax.jit(donate_argnums=(0, 1))
      def step(params, state, batch, i):
        updates, state = tx.update(
          grad(params, batch), state, params, batch_index=i
        )
        return optax.apply_updates(params, updates), state

      for k in range(6):
        types = jax.tree.map(jax.typeof, state)
        params, state = step(params, state, batches[k % 2], k % 2)
        assert jax.tree.map(jax.typeof, state) == types
        assert params["w"].sharding.is_equivalent_to(sharding, 2)
        placed(state[0])
    helpers.assert_close(
      (params, state[0]._replace(mean_error=None)),
      want[:2],
      rtol=1e-5,
      atol=1e-7,
    )

  def test_memory_of_a_sharded_table(self, kind):
    """What one device has to hold counts, not the whole."""
    params = jax.device_put(PARAMS, NamedSharding(make_mesh(), P("data")))
    factory = {
      "alpha": lambda n: optax_svrg.alpha_saga(0.5, n),
      "adaptive": optax_svrg.adaptive_saga,
    }[kind]
    with pytest.raises(ValueError, match=rf"needs {64 * 10**13} bytes, and"):
      factory(10**13).init(params)


TRANSFORMS = {
  "alpha": lambda: optax_svrg.alpha_svrg(0.75, snapshot_dtype="bfloat16"),
  "adaptive": optax_svrg.adaptive_svrg,
  "saga": lambda: optax_svrg.adaptive_saga(2),
}


@eight_devices
@pytest.mark.parametrize(
  "kind", ["saga", *map(helpers.slow, ("alpha", "adaptive"))]
)
class TestStateShardings:
  @staticmethod
  def make(kind):
    return optax.chain(TRANSFORMS[kind](), optax.sgd(0.1, momentum=0.9))

  @staticmethod
  def step(tx, batch):
    def step(params, state):
      grad_fn = lambda p: GRAD(p, batch)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn, batch_index=1
      )
      return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))

  @pytest.mark.parametrize(
    "spec",
    [
      P("data", "model"),
      *map(helpers.slow, (P(), P("data"), P(("data", "model")))),
    ],
  )
  def test_init_inside_jit(self, kind, spec):
    """On a mesh of the type Auto, with donated steps afterwards."""
    tx = self.make(kind)
    sharding = NamedSharding(two_axes(), spec)
    params = jax.device_put(PARAMS, sharding)
    shardings = optax_svrg.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    helpers.assert_equal(state, tx.init(PARAMS))
    assert helpers.types(state) == helpers.types(tx.init(PARAMS))

    def check(state):
      for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        want = sharding if leaf.ndim == 2 else NamedSharding(sharding.mesh, P())
        if leaf.ndim == 3:
          want = NamedSharding(sharding.mesh, P(None, *spec))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), path

    check(state)
    want = (PARAMS, tx.init(PARAMS))
    for batch in BATCHES:
      params, state = self.step(tx, batch)(params, state)
      check(state)
      want = self.step(tx, batch)(*jax.tree.map(jnp.array, want))
    helpers.assert_close((params, state), want, rtol=1e-5, atol=1e-7)

  def test_explicit_mesh(self, kind):
    """There init keeps the shardings by itself, within set_mesh."""
    tx = self.make(kind)
    mesh = make_mesh(AxisType.Explicit)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
      state = jax.jit(tx.init)(params)
      want = optax_svrg.state_shardings(tx, params)
      for leaf, sharding in zip(
        *map(jax.tree.leaves, (state, want)), strict=True
      ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

  def test_state_alone(self, kind):
    """ZeRO: a share of the state on each device, and whole parameters."""
    tx = self.make(kind)
    mesh = make_mesh()
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    split = NamedSharding(mesh, P("data"))
    shardings = optax_svrg.state_shardings(
      tx,
      jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=split), params
      ),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    size = lambda shape: np.prod(shape, dtype=int)
    for leaf in jax.tree.leaves(state):
      share = size(leaf.addressable_shards[0].data.shape)
      assert share == (size(leaf.shape) // 8 if leaf.ndim > 1 else leaf.size)

  def test_restored_scalars_follow_the_parameters(self, kind, tmp_path):
    """Saved from an eager init, whose scalars lie on one device."""
    tx = self.make(kind)
    params = jax.device_put(PARAMS, NamedSharding(make_mesh(), P("data")))
    state = tx.init(params)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    target = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(tx.init, params),
      optax_svrg.state_shardings(tx, params),
    )
    restored = checkpointer.restore(tmp_path / "state", target)
    helpers.assert_equal(restored, state)
    got = self.step(tx, BATCHES[0])(params, restored)
    want = self.step(tx, BATCHES[0])(
      *jax.tree.map(jnp.array, (PARAMS, tx.init(PARAMS)))
    )
    helpers.assert_close(got, want, rtol=1e-5, atol=1e-7)

  def test_errors(self, kind):
    tx = self.make(kind)
    with pytest.raises(
      ValueError, match=r"params must have a .*NamedSharding.* at \['w'\]"
    ):
      optax_svrg.state_shardings(tx, PARAMS)
    with pytest.raises(ValueError, match=r"params must be on one mesh.*'b'"):
      optax_svrg.state_shardings(
        tx,
        {
          "a": jax.device_put(PARAMS["w"], NamedSharding(make_mesh(), P())),
          "b": jax.device_put(PARAMS["w"], NamedSharding(two_axes(), P())),
        },
      )
    with pytest.raises(ValueError, match="params must have at least one leaf"):
      optax_svrg.state_shardings(tx, {})


@eight_devices
@pytest.mark.parametrize(
  ("kind", "spec"),
  [
    ("adaptive", P("data")),
    *(helpers.slow(kind, P()) for kind in ("alpha", "adaptive", "saga")),
    helpers.slow("saga", P("data")),
  ],
)
class TestOffload:
  """The state in the memory of the host."""

  @staticmethod
  def train(kind, spec, memory_kind):
    """Two epochs: what comes out, and the program of a step."""
    first, second = TRANSFORMS[kind](), optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(first, second)
    sharding = NamedSharding(make_mesh(), spec)
    params = jax.device_put(PARAMS, sharding)
    stored = jax.tree.map(
      lambda p: jax.ShapeDtypeStruct(
        p.shape, p.dtype, sharding=sharding.with_memory_kind(memory_kind)
      ),
      params,
    )
    shardings = (
      optax_svrg.state_shardings(first, stored),
      optax_svrg.state_shardings(second, params),
    )

    def check(state):
      for leaf, want in zip(
        *map(jax.tree.leaves, (state, shardings)), strict=True
      ):
        assert leaf.sharding.memory_kind == want.memory_kind
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)

    state = jax.jit(tx.init, out_shardings=shardings)(params)
    check(state)

    def step(params, state, batch, batch_index):
      grad_fn = lambda p: GRAD(p, batch)
      updates, state = tx.update(
        grad_fn(params),
        state,
        params,
        grad_fn=grad_fn,
        batch_index=batch_index,
      )
      return optax.apply_updates(params, updates), state

    step = jax.jit(
      step, donate_argnums=(0, 1), out_shardings=(sharding, shardings)
    )
    snapshot = lambda state, params: optax_svrg.take_snapshot(
      state, params, lambda p: optax_svrg.mean_gradient(GRAD, p, BATCHES)
    )
    if "saga" in kind:
      snapshot = lambda state, params: state
    jitted = jax.jit(snapshot, donate_argnums=0, out_shardings=shardings)
    for take_snapshot in (snapshot, jitted):
      state = take_snapshot(state, params)
      check(state)
      for index, batch in enumerate(BATCHES):
        params, state = step(params, state, batch, index)
        check(state)
    compiled = step.lower(params, state, BATCHES[0], 0).compile()
    return (params, state), compiled.as_text()

  def test_values_and_bytes(self, kind, spec):
    want, in_device = self.train(kind, spec, "device")
    got, offloaded = self.train(kind, spec, "pinned_host")
    helpers.assert_equal(got, want)
    # Of the state, nothing but scalars and marks comes in from the device.
    stored = sum(
      leaf.addressable_shards[0].data.nbytes
      for leaf in jax.tree.leaves(want[1][0])
      if leaf.ndim > 1
    )
    assert stored > 0
    assert self.input_bytes(in_device, on_host=True) == 0
    assert self.input_bytes(offloaded, on_host=True) == stored
    assert self.input_bytes(offloaded, on_host=False) == (
      self.input_bytes(in_device, on_host=False) - stored
    )

  @staticmethod
  def input_bytes(program, on_host):
    """Of a compiled program, by the memory that they are in."""
    (inputs,) = re.findall(r"entry_computation_layout={\((.*?)\)->", program)
    total = 0
    for dtype, shape, layout in re.findall(
      r"(\w+)\[([\d,]*)\](?:{([^}]*)})?", inputs
    ):
      # S(5) is the memory of the host.
      if ("S(5)" in layout) == on_host:
        size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
        total += size * np.prod([int(n) for n in shape.split(",") if n])
    return int(total)


@eight_devices
def test_eager_snapshot_keeps_a_committed_placement():
  """E.g. a mean gradient that was computed on one device or on the host."""
  mesh = make_mesh()
  params = jax.device_put(PARAMS, NamedSharding(mesh, P("data")))
  state = optax_svrg.alpha_svrg(0.5).init(params)
  state = optax_svrg.take_snapshot(
    state, params, lambda p: jax.tree.map(np.asarray, p)
  )
  assert state.mean_grads["w"].sharding == params["w"].sharding
  host = jax.device_put(
    state, NamedSharding(mesh, P(), memory_kind="pinned_host")
  )
  host = optax_svrg.take_snapshot(host, params, lambda p: p)
  assert host.snapshot_params["w"].sharding.memory_kind == "pinned_host"
  assert host.mean_grads["w"].sharding.memory_kind == "pinned_host"
