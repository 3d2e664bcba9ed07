# SPDX-License-Identifier: Apache-2.0
"""Steps for GPU and TPU, lowered where there is neither."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg

TRANSFORMS = {
  "alpha_svrg": optax_svrg.alpha_svrg(0.75),
  "adaptive_svrg": optax_svrg.adaptive_svrg(),
  "adaptive_svrg, bfloat16": optax_svrg.adaptive_svrg(
    snapshot_dtype=jnp.bfloat16
  ),
  "alpha_saga": optax_svrg.alpha_saga(1.0, 7),
  "adaptive_saga": optax_svrg.adaptive_saga(312),
  "adaptive_saga, bfloat16": optax_svrg.adaptive_saga(
    312, table_dtype=jnp.bfloat16
  ),
}


def loss(params, batch):
  x = jax.lax.conv(batch, params["conv"], (1, 1), "SAME")
  x = x.reshape(len(x), -1) @ params["w"] + params["b"]
  return jnp.mean(jnp.tanh(params["scale"] * x) ** 2)


def params_of(dtype):
  return {
    "conv": jax.ShapeDtypeStruct((3, 2, 3, 3), dtype),
    "w": jax.ShapeDtypeStruct((3 * 5 * 5, 7), dtype),
    "b": jax.ShapeDtypeStruct((7,), dtype),
    "scale": jax.ShapeDtypeStruct((), dtype),
  }


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_step(name, dtype):
  tx = optax.chain(TRANSFORMS[name], optax.adamw(1e-3))
  params = params_of(dtype)
  state = jax.eval_shape(tx.init, params)

  @jax.jit
  def step(params, state, batch, i):
    grad_fn = lambda p: jax.grad(loss)(p, batch)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, batch_index=i
    )
    return optax.apply_updates(params, updates), state

  batch = jax.ShapeDtypeStruct((4, 2, 5, 5), dtype)
  index = jax.ShapeDtypeStruct((), jnp.int32)
  exported = jax.export.export(step, platforms=["cuda", "tpu"])(
    params, state, batch, index
  )
  assert exported.platforms == ("cuda", "tpu")
  want = [(x.shape, x.dtype) for x in jax.tree.leaves((params, state))]
  assert [(x.shape, x.dtype) for x in exported.out_avals] == want
  # An extension of one platform would be a call to a library of its own.
  assert "custom_call @cu" not in exported.mlir_module()


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["alpha_svrg", "adaptive_svrg"])
def test_snapshot(name):
  tx = optax.chain(TRANSFORMS[name], optax.sgd(0.1))
  params = params_of(jnp.float32)
  state = jax.eval_shape(tx.init, params)
  take = jax.jit(
    lambda s, p, x: optax_svrg.take_snapshot(
      s, p, lambda q: jax.grad(loss)(q, x)
    )
  )
  batch = jax.ShapeDtypeStruct((4, 2, 5, 5), np.float32)
  exported = jax.export.export(take, platforms=["cuda", "tpu"])(
    state, params, batch
  )
  assert len(exported.out_avals) == len(jax.tree.leaves(state))
