# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, each with devices and data of its own."""

import time

import numpy as np
import pytest

import optax_svrg
from tests import helpers


def run(num_processes, out, method, how, precision):
  """How each process has ended: exit status and output."""
  return helpers.in_processes(
    lambda process, port: [
      *(
        "-m",
        "tests.workers.process_worker",
        method,
        how,
        num_processes,
        process,
      ),
      *(port, precision, out / f"{process}.npz"),
    ],
    num_processes,
  )


def train(num_processes, out, *args):
  """What each process has at the end, as lists of arrays."""
  out.mkdir()
  for status, output in run(num_processes, out, *args):
    assert status == 0, output
  results = []
  for i in range(num_processes):
    with np.load(out / f"{i}.npz") as arrays:
      results.append([arrays[name] for name in arrays.files])
  return results


@pytest.mark.parametrize(
  ("method", "how", "precision"),
  [
    ("adaptive", "shard_map", "float64"),
    helpers.slow("alpha", "jit", "float64"),
    helpers.slow("adaptive", "jit", "float32"),
    helpers.slow("alpha", "shard_map", "float32"),
    helpers.slow("saga", "jit", "float64"),
    helpers.slow("saga", "shard_map", "float64"),
  ],
)
def test_two_processes_train_as_one_does(method, how, precision, tmp_path):
  """With four devices each, as one with eight."""
  args = (method, how, precision)
  (want,) = train(1, tmp_path / "one", *args)
  first, second = train(2, tmp_path / "two", *args)
  tolerance = 1e-12 if precision == "float64" else 1e-6
  for got, other, leaf in zip(first, second, want, strict=True):
    np.testing.assert_array_equal(got, other)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, leaf, rtol=0, atol=tolerance)


_UNLIKE = "ValueError: batches[1] must be alike in all processes, got"


def test_lockstep_refuses():
  with pytest.raises(TypeError, match="batches must be an iterable"):
    optax_svrg.lockstep({"x": np.ones(2)})
  with pytest.raises(ValueError, match="timeout must be positive, got 0"):
    optax_svrg.lockstep([], timeout=0)


_BATCH = "PyTreeDef(*) of float32[32, 4] in process 0 and"
# What processes 0 and 1 say of a fault of process 1.
FAULTS = {
  "missing": (
    f"{_UNLIKE} {_BATCH} no further batch in process 1.",
    _UNLIKE,
  ),
  "short": (
    f"{_UNLIKE} {_BATCH} PyTreeDef(*) of float32[16, 4] in process 1.",
    _UNLIKE,
  ),
  "failed": (
    f"{_UNLIKE} {_BATCH} RuntimeError: the disk is gone in process 1.",
    "RuntimeError: the disk is gone",
  ),
  "stalled": (
    "TimeoutError: batches[1]: process 1 of 2 did not come to it within 2"
    " seconds, or is lost.",
    "TimeoutError: batches[1]",
  ),
  # JAX itself notices.
  "died": ("The following tasks are unhealthy", ""),
}


@pytest.mark.parametrize(
  "fault",
  [fault if fault == "failed" else helpers.slow(fault) for fault in FAULTS],
)
def test_a_process_without_a_batch_ends_all(fault, tmp_path):
  """With an error that says what is amiss, and soon."""
  start = time.monotonic()
  results = run(2, tmp_path, "fault", fault, "float32")
  for (status, output), message in zip(results, FAULTS[fault], strict=True):
    assert status != 0
    assert message in output
  assert time.monotonic() - start < 120
