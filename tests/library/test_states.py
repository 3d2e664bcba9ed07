# SPDX-License-Identifier: Apache-2.0
"""States that come from elsewhere: checkpoints, replicas, other containers."""

import ast
import copy
import pathlib
import pickle
from typing import Any

import flax
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg
from optax_svrg import _checks
from tests import helpers

PARAMS = {"w": jnp.arange(3.0), "b": jnp.array([[2.0]])}
FACTORIES = {
  "alpha_svrg": lambda **kwargs: optax_svrg.alpha_svrg(0.5, **kwargs),
  "adaptive_svrg": optax_svrg.adaptive_svrg,
  "alpha_saga": lambda n=3, **kwargs: optax_svrg.alpha_saga(0.5, n, **kwargs),
  "adaptive_saga": lambda n=3, **kwargs: optax_svrg.adaptive_saga(n, **kwargs),
}
every_method = pytest.mark.parametrize("method", FACTORIES)


def visited(tx: Any, params: Any = PARAMS, steps: int = 5) -> Any:
  """The state after a snapshot and some updates, of any method."""
  state = tx.init(params)
  if isinstance(state, optax_svrg.SVRGState):
    state = optax_svrg.take_snapshot(state, params, lambda p: p)
  for step in range(steps):
    state = update(tx, params, state, step)[1]
  return state


def update(tx: Any, params: Any, state: Any, step: int = 0) -> Any:
  grads = helpers.random_like(params, step % 3)
  return tx.update(
    grads, state, params, grad_fn=lambda p: p, batch_index=step % 3
  )


def by_pickle(state: Any, target: Any) -> Any:
  del target
  return pickle.loads(pickle.dumps(jax.device_get(state)))


def by_msgpack(state: Any, target: Any) -> Any:
  raw = flax.serialization.to_bytes(state)
  return flax.serialization.from_bytes(target, raw)


restoring = pytest.mark.parametrize("restore", [by_pickle, by_msgpack])


class TestRestored:
  """A state must be that of the factory, or update says what differs."""

  @every_method
  @restoring
  def test_goes_on_as_if_it_had_not_been_saved(self, method, restore):
    """Also eagerly, with leaves of NumPy."""
    tx = FACTORIES[method]()
    state = visited(tx)
    restored = restore(state, tx.init(PARAMS))
    for step in range(5, 8):
      want, state = update(tx, PARAMS, state, step)
      got, restored = update(tx, PARAMS, restored, step)
      helpers.assert_equal(got, want)
    helpers.assert_equal(restored, state)
    assert state.alpha > 0

  @pytest.mark.parametrize("method", ["alpha_saga", "adaptive_saga"])
  @restoring
  def test_another_number_of_batches(self, method, restore):
    tx = FACTORIES[method](3)
    state = restore(visited(tx), tx.init(PARAMS))
    for other in (2, 4, 30):
      changed = FACTORIES[method](other)
      step = lambda s, tx=changed: update(tx, PARAMS, s)
      for fn in (step, jax.jit(step)):
        with pytest.raises(
          ValueError, match=f"a table of 3 batches .* num_batches is {other}"
        ):
          fn(state)

  def test_a_table_split_otherwise_for_as_many_batches(self):
    tx = FACTORIES["alpha_saga"](30)
    state = tx.init(PARAMS)
    flat = state._replace(
      table=jax.tree.map(lambda p: jnp.zeros((30, *p.shape)), PARAMS)
    )
    with pytest.raises(
      ValueError, match=r"a table of 30 batches in .*\(30, 3\)"
    ):
      update(tx, PARAMS, flat)

  @pytest.mark.parametrize("source", ["svrg", "saga"])
  @pytest.mark.parametrize(
    ("made_by", "given_to"), [("alpha", "adaptive"), ("adaptive", "alpha")]
  )
  def test_an_estimate_that_is_missing_or_unexpected(
    self, source, made_by, given_to
  ):
    state = visited(FACTORIES[f"{made_by}_{source}"]())
    tx = FACTORIES[f"{given_to}_{source}"]()
    with pytest.raises(
      ValueError,
      match=f"it was made by an {made_by} .* given to an {given_to} one",
    ):
      update(tx, PARAMS, state)

  @pytest.mark.parametrize(
    ("made_with", "given_to"),
    [(None, "bfloat16"), ("bfloat16", None), ("bfloat16", "float16")],
  )
  @pytest.mark.parametrize("source", ["svrg", "saga"])
  def test_another_dtype_of_what_is_stored(self, source, made_with, given_to):
    argument = {"svrg": "snapshot_dtype", "saga": "table_dtype"}[source]
    state = visited(FACTORIES[f"alpha_{source}"](**{argument: made_with}))
    tx = FACTORIES[f"alpha_{source}"](**{argument: given_to})
    with pytest.raises(ValueError, match=f"has dtype .* but {argument}="):
      update(tx, PARAMS, state)

  @every_method
  @pytest.mark.parametrize(
    "damage", [dict, lambda s: list(s.values()), lambda _: optax.EmptyState()]
  )
  def test_of_another_type(self, method, damage):
    """What a checkpoint becomes that is restored without a target."""
    tx = FACTORIES[method]()
    state = damage(visited(tx)._asdict())
    with pytest.raises(TypeError, match=r"state must be the .* that init ret"):
      update(tx, PARAMS, state)

  def test_snapshot_of_a_state_that_is_a_dict(self):
    state = visited(FACTORIES["alpha_svrg"]())._asdict()
    with pytest.raises(ValueError, match=r"holds no SVRGState.*checkpoint"):
      optax_svrg.take_snapshot((state,), PARAMS, lambda p: p)


def test_no_assert_carries_a_check_of_the_library():
  """It would be gone under python -O."""
  files = list(pathlib.Path(optax_svrg.__file__).parent.glob("*.py"))
  assert len(files) > 10
  for file in files:
    nodes = ast.walk(ast.parse(file.read_text()))
    assert not [node for node in nodes if isinstance(node, ast.Assert)], file


class TestStacked:
  """States with a leading axis of members or devices."""

  STACKED = jax.tree.map(lambda p: jnp.stack([p, p + 1]), PARAMS)

  @pytest.mark.parametrize("method", ["alpha_svrg", "adaptive_svrg"])
  def test_snapshot_of_a_stacked_state(self, method):
    """Eagerly as inside vmap, and each member by itself."""
    tx = FACTORIES[method]()
    state = jax.vmap(tx.init)(self.STACKED)
    mean = lambda p: jax.tree.map(lambda x: x.at[0].set(jnp.nan), p)
    got = optax_svrg.take_snapshot(state, self.STACKED, mean)
    assert helpers.types(got) == helpers.types(state)
    np.testing.assert_array_equal(got.is_finite, [False, True])
    np.testing.assert_array_equal(got.num_snapshots, [1, 1])
    member = lambda s, i: jax.tree.map(lambda x: x[i], s)
    want = optax_svrg.take_snapshot(
      tx.init(member(self.STACKED, 1)), member(self.STACKED, 1), lambda p: p
    )
    helpers.assert_equal(member(got, 1), want)
    vmapped = jax.vmap(
      lambda s, p: optax_svrg.take_snapshot(s, p, lambda q: q)
    )(state, self.STACKED)
    helpers.assert_equal(member(vmapped, 1), want)

  @every_method
  def test_update_says_how_to_vmap(self, method):
    tx = FACTORIES[method]()
    state = jax.vmap(tx.init)(self.STACKED)
    with pytest.raises(ValueError, match=r"stacked.*\(2,\).*vmap or jax\.pmap"):
      update(tx, self.STACKED, state)

  @every_method
  def test_replicated_for_pmap(self, method):
    """The path of programs that replicate and split batches by hand."""
    tx = FACTORIES[method]()
    replicated = flax.jax_utils.replicate((PARAMS, tx.init(PARAMS)))
    params, state = replicated
    if "svrg" in method:
      state = optax_svrg.take_snapshot(state, params, lambda p: p)
      assert helpers.types(state) == helpers.types(replicated[1])
    step = jax.pmap(lambda p, s: update(tx, p, s), axis_name="devices")
    updates, state = step(params, state)
    want = update(tx, PARAMS, visited(tx, steps=0))
    helpers.assert_close(
      flax.jax_utils.unreplicate((updates, state)), want, rtol=1e-6
    )


class Pair:
  """A pytree class that checks what it is made of."""

  def __init__(self, first: Any, second: Any):
    for child in (first, second):
      if not isinstance(child, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise TypeError(f"{child!r} is no array")
    self.children = first, second

  def map(self, fn: Any) -> "Pair":
    return Pair(*map(fn, self.children))


jax.tree_util.register_pytree_node(
  Pair, lambda pair: (pair.children, None), lambda _, x: Pair(*x)
)


@every_method
@pytest.mark.parametrize(
  "make",
  [Pair, lambda a, b: hk.data_structures.to_immutable_dict({"a": a, "b": b})],
)
def test_nothing_but_arrays_is_put_where_arrays_belong(method, make):
  """Pytree classes that check their children, and Haiku's FlatMap."""
  tx = FACTORIES[method]()
  params = make(jnp.arange(3.0), jnp.ones((2, 2)))
  plain = jax.tree.leaves(params)
  state, want_state = visited(tx, params), visited(tx, plain)
  for step in range(5, 8):
    got, state = update(tx, params, state, step)
    want, want_state = update(tx, plain, want_state, step)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    helpers.assert_equal(jax.tree.leaves(got), want)
  jitted = jax.jit(lambda p, s: update(tx, p, s))(params, state)
  assert jax.tree.structure(jitted[1]) == jax.tree.structure(state)


def test_mean_gradient_and_table_of_a_class_that_checks_its_children():
  params = Pair(jnp.arange(3.0), jnp.ones((2, 2)))
  grad_fn = lambda p, x: p.map(lambda leaf: leaf * jnp.mean(x))
  batches = [jnp.ones(2), 3 * jnp.ones(2)]
  mean, table = optax_svrg.gradient_table(grad_fn, params, batches)
  helpers.assert_equal(mean, params.map(lambda x: 2 * x))
  helpers.assert_equal(table[1], params.map(lambda x: 3 * x))
  assert optax_svrg.smoothness(grad_fn, params, batches) > 2.9


class TestCounts:
  """They stop at the largest number instead of becoming negative."""

  LAST = jnp.iinfo(jnp.int32).max

  @every_method
  def test_updates(self, method):
    tx = FACTORIES[method]()
    state = visited(tx)._replace(count=jnp.array(self.LAST, jnp.int32))
    assert update(tx, PARAMS, state)[1].count == self.LAST

  def test_snapshots(self):
    tx = FACTORIES["alpha_svrg"]()
    state = visited(tx)._replace(num_snapshots=jnp.array(self.LAST, jnp.int32))
    state = optax_svrg.take_snapshot(state, PARAMS, lambda p: p)
    assert state.num_snapshots == self.LAST


class TestMemory:
  """Whether a table fits is asked of what is free."""

  class Device:
    """A device as jax.Device describes it."""

    def __init__(self, stats: Any, platform: str = "gpu"):
      self.memory_stats = lambda: stats
      self.platform = platform

  def test_bytes_in_use_are_not_free(self):
    stats = {"bytes_limit": 100, "bytes_in_use": 70}
    assert _checks.device_memory(self.Device(stats)) == 30
    assert _checks.device_memory(self.Device({"bytes_limit": 100})) == 100
    assert _checks.device_memory(self.Device(None)) is None
    host = _checks.device_memory(self.Device(None, "cpu"))
    assert 0 < host < 2**50

  def test_a_table_between_free_and_all_bytes(self, monkeypatch):
    stats = {"bytes_limit": 1000, "bytes_in_use": 900}
    monkeypatch.setattr(
      _checks,
      "device_memory",
      lambda _: stats["bytes_limit"] - stats["bytes_in_use"],
    )
    with pytest.raises(ValueError, match=r"needs 160 bytes, and .* has 100"):
      FACTORIES["alpha_saga"](10).init(PARAMS)


def offloaded(state: Any) -> Any:
  """A state with its trees in the memory of the host, and scalars not."""
  host = lambda tree: jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")),
    tree,
  )
  names = {"snapshot_params", "table", "mean_grads", "mean_error"}
  return state._replace(
    **{n: host(getattr(state, n)) for n in names & {*state._fields}}
  )


@every_method
def test_a_state_in_the_memory_of_the_host_stays_there(method):
  """Without shardings of the results, which would move it back."""
  tx = FACTORIES[method]()
  state = visited(tx)
  kinds = lambda s: jax.tree.map(lambda x: x.sharding.memory_kind, s)
  host = offloaded(state)
  want_kinds = kinds(host)
  assert {"device", "pinned_host"} <= {*jax.tree.leaves(want_kinds)}
  step = jax.jit(lambda s: update(tx, PARAMS, s, 5))
  for _ in range(2):
    (want, state), (got, host) = step(state), step(host)
    helpers.assert_equal((got, host), (want, state))
    assert kinds(host) == want_kinds
  if "svrg" in method:
    take = lambda s: optax_svrg.take_snapshot(s, PARAMS, lambda p: p)
    for fn in (take, jax.jit(take)):
      assert kinds(fn(host)) == want_kinds


def test_numpy_parameters_in_double_precision_without_x64(recwarn):
  """As silent as Optax's optimizers."""
  params = {"w": np.ones(3), "v": np.float64(2.0)}
  grad = lambda params, batch: params
  for factory in FACTORIES.values():
    tx = optax.chain(factory(), optax.sgd(0.1))
    state = tx.init(params)
    if isinstance(state[0], optax_svrg.SVRGState):
      state = optax_svrg.take_snapshot(
        state,
        params,
        lambda p: optax_svrg.mean_gradient(grad, p, [np.ones(2)]),
      )
    updates, _ = update(tx, params, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(np.float32)}
  assert not recwarn.list


@every_method
def test_states_can_be_copied(method):
  state = visited(FACTORIES[method]())
  helpers.assert_equal(copy.deepcopy(state), state)
