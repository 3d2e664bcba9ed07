# SPDX-License-Identifier: Apache-2.0
r"""SGD, SVRG and SAGA on a convex problem
======================================

With a constant step size, SGD stops improving at a distance from the minimum
that its noise sets. SVRG and SAGA converge linearly. The problem is ridge
regression on random data, whose minimum is known in closed form, in double
precision.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_svrg

jax.config.update("jax_enable_x64", True)
num_batches, batch_size, dimension, l2 = 100, 5, 20, 1e-2
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (num_batches, batch_size, dimension))
y = x @ jax.random.normal(keys[1], (dimension,))
y += jax.random.normal(keys[2], y.shape)


def loss(w, batch):
  x, y = batch
  return jnp.mean((x @ w - y) ** 2) / 2 + l2 / 2 * jnp.sum(w**2)


data = (x.reshape(-1, dimension), y.ravel())
hessian = data[0].T @ data[0] / len(data[1]) + l2 * jnp.eye(dimension)
minimizer = jnp.linalg.solve(hessian, data[0].T @ data[1] / len(data[1]))
grad = jax.jit(jax.grad(loss))
suboptimality = jax.jit(lambda w: loss(w, data) - loss(minimizer, data))

# %%
# One over the largest curvature of the batches is a step size for all three.

batches = list(zip(x, y, strict=True))
step_size = 1 / optax_svrg.smoothness(grad, jnp.zeros(dimension), batches)
print(f"step size {step_size:.3f}")

# %%
# An epoch of each method is one compiled scan. The state is donated, so that
# the table of SAGA is updated in place.


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_epoch(tx, w, state, order):
  def step(carry, i):
    w, state = carry
    grad_fn = lambda w: grad(w, (x[i], y[i]))
    updates, state = tx.update(
      grad_fn(w), state, w, grad_fn=grad_fn, batch_index=i
    )
    return (optax.apply_updates(w, updates), state), None

  return jax.lax.scan(step, (w, state), order)[0]


def train(estimator, num_gradients, budget=60):
  """Returns gradients per example and suboptimality after each epoch."""
  tx = optax.chain(estimator, optax.sgd(step_size))
  rng = np.random.default_rng(0)
  w = jnp.zeros(dimension)
  state = tx.init(w)
  curve = [(0, float(suboptimality(w)))]
  while curve[-1][0] < budget:
    if num_gradients == 3:
      state = optax_svrg.take_snapshot(state, w, lambda w: grad(w, data))
    w, state = train_epoch(tx, w, state, rng.permutation(num_batches))
    curve.append((curve[-1][0] + num_gradients, float(suboptimality(w))))
  return np.array(curve).T


curves = {
  "SGD": train(optax.identity(), 1),
  "SVRG": train(optax_svrg.alpha_svrg(1.0), 3),
  "adaptive SVRG": train(optax_svrg.adaptive_svrg(), 3),
  "SAGA": train(optax_svrg.alpha_saga(1.0, num_batches), 1),
}
for name, curve in curves.items():
  print(f"{name:14} {curve[1][-1]:.1e} above the minimum")

# %%
# At equal gradients, SAGA is the fastest here: it needs neither a second
# gradient nor a pass for a snapshot.

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
styles = {"SGD": "k-", "SVRG": "C0-", "adaptive SVRG": "C0--", "SAGA": "C1-"}
for name, curve in curves.items():
  axes.semilogy(*np.maximum(curve, 1e-16), styles[name], label=name)
axes.set_xlabel("gradients per example")
axes.set_ylabel("loss above the minimum")
figure.legend(loc="outside upper center", ncols=4, frameon=False)
plt.show()
