# SPDX-License-Identifier: Apache-2.0
"""The paper's schedule of the coefficient."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_svrg

counts = st.integers(1, 6)


@hypothesis.given(
  st.floats(-2, 2, allow_subnormal=False), counts, counts, st.none() | counts
)
def test_is_numpy_linspace_over_the_intervals(
  init_value, epochs, steps_per_epoch, steps_per_snapshot
):
  hypothesis.assume((steps_per_snapshot or 0) <= steps_per_epoch)
  with jax.enable_x64(True):
    schedule = optax_svrg.linear_decay(
      init_value,
      epochs,
      steps_per_epoch,
      steps_per_snapshot=steps_per_snapshot,
    )
    interval = steps_per_snapshot or steps_per_epoch
    values = iter(
      np.linspace(init_value, 0, epochs * math.ceil(steps_per_epoch / interval))
    )
    # As training would do it: a new interval at each epoch's start.
    want = []
    for _ in range(epochs):
      for step in range(steps_per_epoch):
        if step % interval == 0:
          value = next(values)
        want.append(value)
    assert next(values, None) is None
    got = [float(schedule(count)) for count in range(len(want))]
    np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)
    # Constant afterwards.
    assert float(schedule(len(want))) == got[-1]
    assert float(schedule(10 * len(want))) == got[-1]


def test_ends_are_exact():
  schedule = optax_svrg.linear_decay(0.7, 37, 11)
  assert schedule(0) == jnp.float32(0.7)
  assert schedule(37 * 11 - 1) == 0
  assert optax_svrg.linear_decay(0.7, 1, 11)(5) == jnp.float32(0.7)


def test_inside_jit_and_on_arrays():
  schedule = optax_svrg.linear_decay(1.0, 5, 2)
  want = np.repeat([1.0, 0.75, 0.5, 0.25, 0.0], 2)
  np.testing.assert_allclose(jax.jit(schedule)(jnp.arange(10)), want)
  assert jax.jit(schedule)(jnp.int32(3)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
@pytest.mark.parametrize("jit", [False, True])
def test_counts_of_any_integer_dtype(dtype, jit):
  """Also where an epoch has more steps than the dtype can count."""
  schedule = optax_svrg.linear_decay(0.75, 4, 100)
  schedule = jax.jit(schedule) if jit else schedule
  for count, want in ((5, 0.75), (100, 0.5), (127, 0.5)):
    got = schedule(jnp.asarray(count, dtype))
    assert got.dtype == jnp.float32
    assert got == want
  long = optax_svrg.linear_decay(0.75, 4, 1000)
  assert long(jnp.asarray(100, dtype)) == 0.75


def test_far_and_negative_counts():
  schedule = optax_svrg.linear_decay(0.75, 4, 100, steps_per_snapshot=7)
  assert schedule(-5) == 0.75
  assert schedule(2**31 - 1) == 0


@pytest.mark.parametrize(
  ("args", "error", "message"),
  [
    (("1", 2, 3), TypeError, r"init_value must be a real number, got '1'"),
    ((math.nan, 2, 3), ValueError, r"init_value must be finite, got nan"),
    ((0.5, 0, 3), ValueError, r"epochs must be at least 1, got 0"),
    ((0.5, 2.0, 3), TypeError, r"epochs must be an integer, got 2.0"),
    ((0.5, 2, -3), ValueError, r"steps_per_epoch must be at least 1, got -3"),
    ((0.5, 2, True), TypeError, r"steps_per_epoch must be an integer"),
    ((0.5, 2, 3, 0), ValueError, r"steps_per_snapshot must be at least 1"),
    (
      (0.5, 2, 3, 4),
      ValueError,
      r"steps_per_snapshot must be at most steps_per_epoch.* got 4 and 3",
    ),
  ],
)
def test_bad_arguments(args, error, message):
  names = ("init_value", "epochs", "steps_per_epoch", "steps_per_snapshot")
  with pytest.raises(error, match=message):
    optax_svrg.linear_decay(**dict(zip(names, args, strict=False)))
