# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Training in several processes, each with devices and data of its own."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(num_processes, out, method, how, precision):
  """What each process has at the end, as lists of arrays."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  workers = []
  for i in range(num_processes):
    args = [method, how, num_processes, i, port, precision, out / f"{i}.npz"]
    workers.append(
      subprocess.Popen(
        [sys.executable, "-m", "tests.process_worker", *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  try:
    for worker in workers:
      output, _ = worker.communicate(timeout=300)
      assert worker.returncode == 0, output
  finally:
    for worker in workers:
      worker.kill()
  results = []
  for i in range(num_processes):
    with np.load(out / f"{i}.npz") as arrays:
      results.append([arrays[name] for name in arrays.files])
  return results


@pytest.mark.parametrize(
  ("method", "how", "precision"),
  [
    ("alpha", "jit", "float64"),
    ("adaptive", "jit", "float32"),
    ("adaptive", "shard_map", "float64"),
    ("alpha", "shard_map", "float32"),
    ("saga", "jit", "float64"),
    ("saga", "shard_map", "float64"),
  ],
)
def test_two_processes_train_as_one_does(method, how, precision, tmp_path):
  """With four devices each, as one with eight."""
  one, two = tmp_path / "one", tmp_path / "two"
  one.mkdir()
  two.mkdir()
  (want,) = run(1, one, method, how, precision)
  first, second = run(2, two, method, how, precision)
  tolerance = 1e-12 if precision == "float64" else 1e-6
  for got, other, leaf in zip(first, second, want, strict=True):
    np.testing.assert_array_equal(got, other)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, leaf, rtol=0, atol=tolerance)
