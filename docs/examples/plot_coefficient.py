# SPDX-License-Identifier: Apache-2.0
r"""Coefficient and variance during training
========================================

A small network in Flax NNX is trained with adaptive SVRG and adaptive SAGA. The
states report the coefficient and an estimate of the variance of the corrected
gradient, divided by that of the plain one. With a snapshot per epoch, adaptive
SVRG takes three gradients where the other two take one.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_svrg

epochs, num_batches, batch_size = 12, 32, 32
key, noise_key = jax.random.split(jax.random.key(0))
x = jax.random.normal(key, (num_batches, batch_size, 8))
y = jnp.sin(x).sum(axis=-1)
y += 0.5 * jax.random.normal(noise_key, y.shape)
batches = list(zip(x, y, strict=True))


def loss_fn(model, batch):
  x, y = batch
  return jnp.mean((model(x)[:, 0] - y) ** 2)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, batch, batch_index):
  loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads, grad_fn=grad_fn, batch_index=batch_index)
  return loss


def train(estimator, takes_snapshots):
  """Returns train losses, coefficients and variance ratios of all epochs."""
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(8, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 1, rngs=rngs)
  )
  schedule = optax.cosine_decay_schedule(1e-2, epochs * num_batches)
  tx = optax.chain(estimator, optax.adam(schedule))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  mean_grad = optax_svrg.flax.mean_grad_fn
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(epochs):
    if takes_snapshots:
      optax_svrg.flax.take_snapshot(
        optimizer, model, mean_grad(loss_fn, model, batches)
      )
    losses = [
      train_step(model, optimizer, batches[i], i)
      for i in rng.permutation(num_batches)
    ]
    alpha = optax.tree.get(optimizer.opt_state, "alpha")
    ratio = optax.tree.get(optimizer.opt_state, "variance_ratio", 1.0)
    rows.append((np.mean(losses), float(alpha[...]), float(ratio)))
  return np.array(rows).T


results = {
  "plain": train(optax_svrg.alpha_svrg(0.0), False),
  "adaptive SVRG": train(optax_svrg.adaptive_svrg(), True),
  "adaptive SAGA": train(optax_svrg.adaptive_saga(num_batches), False),
}

# %%
# SVRG's coefficient is 1 after a snapshot and is shown at the end of each
# epoch. SAGA's rises from 0 as the learning rate decreases and stored gradients
# age less.

figure, axes = plt.subplots(
  2, 1, figsize=(6, 5), sharex=True, layout="constrained"
)
for name, (losses, alphas, ratios) in results.items():
  print(f"{name}: mean train loss of the last epoch {losses[-1]:.3f}")
  if name == "plain":
    continue
  axes[0].plot(range(1, epochs + 1), alphas, label=name)
  axes[1].plot(range(1, epochs + 1), ratios)
axes[0].set_ylabel("coefficient")
axes[1].set_ylabel("variance ratio")
axes[1].set_xlabel("epoch")
axes[1].axhline(1 / 3, color="gray", linestyle=":")
axes[1].text(
  epochs, 1 / 3, "1 / (gradients per step of SVRG)", ha="right", va="bottom"
)
figure.legend(loc="outside upper center", ncols=2, frameon=False)
plt.show()
