# SPDX-License-Identifier: Apache-2.0
"""The coefficient schedule of the alpha-SVRG paper."""

import math

import jax
import jax.numpy as jnp
import optax

from optax_svrg import _checks


def linear_decay(
  init_value: float,
  epochs: int,
  steps_per_epoch: int,
  *,
  steps_per_snapshot: int | None = None,
) -> optax.Schedule:
  r"""The paper's schedule: linear decay, constant between snapshots.

  Training is divided into :math:`n = \text{epochs} \cdot \lceil
  \text{steps_per_epoch} / \text{steps_per_snapshot} \rceil` intervals, one per
  snapshot; the last interval of an epoch may be short. During interval :math:`i
  = 0, \ldots, n - 1` the value is ``numpy.linspace(init_value, 0, n)[i]``:
  ``init_value`` in the first interval, exactly 0 in the last one and
  afterwards. With ``n = 1`` it is always ``init_value``.

  Args:
    init_value: the coefficient :math:`\alpha_0` of the first interval, a finite
      number. The paper uses 0.5 and 0.75.
    epochs: number of epochs of the whole training, at least 1.
    steps_per_epoch: number of updates in an epoch, at least 1.
    steps_per_snapshot: number of updates between two snapshots, at least 1;
      ``None`` for one snapshot per epoch.

  Returns:
    An :class:`optax.Schedule`: a function from the number of updates made so
    far (an integer or an integer array of any shape) to the coefficient, a
    float array of the same shape in JAX's default float dtype.

  Raises:
    TypeError: if an argument is not a number of the kind described above.
    ValueError: if ``init_value`` is not finite, a count is below 1, or
      ``steps_per_snapshot`` exceeds ``steps_per_epoch``.

  Examples:
    >>> import optax_svrg
    >>> schedule = optax_svrg.linear_decay(0.75, epochs=4, steps_per_epoch=100)
    >>> [float(schedule(step)) for step in (0, 99, 100, 200, 399, 400)]
    [0.75, 0.75, 0.5, 0.25, 0.0, 0.0]

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025 (``svrg_scheduler`` in their
    code)
  """
  _checks.check_coefficient(init_value, "init_value")
  epochs = _checks.check_count(epochs, "epochs")
  steps_per_epoch = _checks.check_count(steps_per_epoch, "steps_per_epoch")
  if steps_per_snapshot is None:
    steps_per_snapshot = steps_per_epoch
  interval = _checks.check_count(steps_per_snapshot, "steps_per_snapshot")
  if interval > steps_per_epoch:
    raise ValueError(
      "steps_per_snapshot must be at most steps_per_epoch, as intervals start"
      f" again with each epoch, got {interval} and {steps_per_epoch}."
    )
  intervals_per_epoch = math.ceil(steps_per_epoch / interval)
  last = epochs * intervals_per_epoch - 1

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    # Like Optax's schedules before their start, which negative counts are.
    count = jnp.maximum(_checks.wide_index(count), 0)
    epoch, step = jnp.divmod(count, steps_per_epoch)
    index = jnp.minimum(epoch * intervals_per_epoch + step // interval, last)
    # The share that remains, rather than a sum of decrements: exact at both
    # ends and to the last bit of the dtype in between.
    remaining = (last - index).astype(float) / max(last, 1)
    return init_value * (remaining if last else jnp.ones_like(remaining))

  return schedule
