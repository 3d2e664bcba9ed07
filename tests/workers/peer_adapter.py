# SPDX-License-Identifier: Apache-2.0
"""What Optax's own test suites are given in place of an Optax optimizer.

The suites call ``update`` without extra arguments, except that they hand the
objective as ``obj_fn`` to an optimizer of the name "sophia".
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_svrg


def plain(
  learning_rate: optax.ScalarOrSchedule = 1e-3, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
  """The reference: what it passes, the others must pass."""
  return optax.sgd(learning_rate, momentum)


def alpha_svrg(
  learning_rate: optax.ScalarOrSchedule = 1e-3, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
  """The reference with alpha_svrg before it, and a snapshot now and then."""
  tx = optax.chain(
    optax_svrg.alpha_svrg(0.5), optax.sgd(learning_rate, momentum)
  )

  def update(
    updates: Any, state: Any, params: Any = None, *, obj_fn=None, **extra_args
  ) -> Any:
    if obj_fn is None:
      # The only gradient that is known is the one at the current parameters.
      grad_fn, period = lambda _: updates, 1
    else:
      grad_fn, period = jax.grad(obj_fn), 7
    state = jax.lax.cond(
      state[0].count % period == 0,
      lambda s: optax_svrg.take_snapshot(s, params, grad_fn),
      lambda s: s,
      state,
    )
    return tx.update(updates, state, params, grad_fn=grad_fn, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def adaptive_saga(
  learning_rate: optax.ScalarOrSchedule = 1e-3, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
  """The reference with adaptive_saga before it, in a new order each epoch.

  All batches are one function here, so that an entry differs from the mean by
  its age alone.
  """
  num_batches = 5
  tx = optax.chain(
    optax_svrg.adaptive_saga(num_batches), optax.sgd(learning_rate, momentum)
  )

  def update(
    updates: Any, state: Any, params: Any = None, *, obj_fn=None, **extra_args
  ) -> Any:
    del obj_fn
    epoch, step = jnp.divmod(state[0].count, num_batches)
    index = jax.random.permutation(jax.random.key(epoch), num_batches)[step]
    return tx.update(updates, state, params, batch_index=index, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)
