# SPDX-License-Identifier: Apache-2.0
"""Shardings of the state of every optimizer of Optax, wrapped or not."""

import inspect
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import optax
import pytest

import optax_svrg

pytestmark = pytest.mark.standard_promotion

# More arguments than a learning rate, or none.
_ARGUMENTS: dict[str, dict[str, Any]] = {
  "dpsgd": {
    "l2_norm_clip": 1.0,
    "noise_multiplier": 1.0,
    "key": 0,
    "learning_rate": 0.1,
  },
  "schedule_free": {"base_optimizer": optax.sgd(0.1), "learning_rate": 0.1},
  "mechanize": {"base_optimizer": optax.sgd(0.1)},
  "sam": {"optimizer": optax.sgd(0.1), "adv_optimizer": optax.sgd(0.1)},
  "prodigy": {},
  "dog": {"learning_rate": 1.0},
}


def optimizers() -> dict[str, optax.GradientTransformation]:
  """All of Optax and optax.contrib that are made of a learning rate."""
  found = {}
  for module in (optax, optax.contrib):
    for name in dir(module):
      make = getattr(module, name)
      if name.startswith("_") or not inspect.isfunction(make):
        continue
      arguments = _ARGUMENTS.get(name)
      if arguments is None:
        if "learning_rate" not in inspect.signature(make).parameters:
          continue
        arguments = {"learning_rate": 1e-3}
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("ignore")
          tx = make(**arguments)
      except TypeError:
        continue
      if isinstance(tx, optax.GradientTransformation):
        found[f"{module.__name__}.{name}"] = tx
  return found


OPTIMIZERS = optimizers()
SVRG = optax_svrg.adaptive_svrg()
WRAPPED = {
  "partition": optax.partition(
    {"a": optax.adam(0.1), "b": optax.chain(SVRG, optax.sgd(0.1))},
    {"layer": {"w": "a", "b": "b"}, "scale": "b"},
  ),
  "masked": optax.masked(
    optax.adam(0.1), {"layer": {"w": True, "b": False}, "scale": True}
  ),
  "MultiSteps": optax.MultiSteps(optax.chain(SVRG, optax.adam(0.1)), 2),
  "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
    learning_rate=0.1
  ),
  "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
  "saga": optax.chain(optax_svrg.alpha_saga(0.5, 30), optax.contrib.muon(0.1)),
  "svrg": optax.chain(
    optax_svrg.alpha_svrg(0.5, snapshot_dtype="bfloat16"), optax.lbfgs()
  ),
}
# No other shape ends like this one.
SHAPE = (6, 4)
SPEC = P("x", "y")


def make_params() -> Any:
  mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return {
    "layer": {
      "w": put(jnp.ones(SHAPE), SPEC),
      "b": put(jnp.ones(5), P()),
    },
    "scale": put(jnp.ones(()), P()),
  }


def test_optimizers_are_found():
  names = {name.rpartition(".")[2] for name in OPTIMIZERS}
  assert len(names) >= 35
  assert {"adamw", "lbfgs", "novograd", "sm3", "muon", "adafactor"} <= names


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WRAPPED])
def test_like_a_parameter_where_path_and_shape_say_so(name):
  """And replicated otherwise."""
  tx = (OPTIMIZERS | WRAPPED)[name]
  params = make_params()
  shardings = optax_svrg.state_shardings(tx, params)
  state = jax.eval_shape(tx.init, params)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  for leaf, sharding in zip(
    *map(jax.tree.leaves, (state, shardings)), strict=True
  ):
    assert isinstance(sharding, NamedSharding)
    stacked = len(leaf.shape) - len(SHAPE)
    if stacked >= 0 and leaf.shape[stacked:] == SHAPE:
      assert sharding.spec == P(*[None] * stacked, *SPEC)
    else:
      assert all(axis is None for axis in sharding.spec)


@pytest.mark.parametrize("name", ["partition", "saga", "svrg"])
def test_init_takes_them(name):
  params = make_params()
  tx = WRAPPED[name]
  shardings = optax_svrg.state_shardings(tx, params)
  state = jax.jit(tx.init, out_shardings=shardings)(params)
  for leaf, sharding in zip(
    *map(jax.tree.leaves, (state, shardings)), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
