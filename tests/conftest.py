# SPDX-License-Identifier: Apache-2.0
"""Strict JAX promotion for our own arithmetic, and double precision."""

import atexit
from collections.abc import Iterator
import os
import shutil
import tempfile

import hypothesis
import jax
import pytest

# Compilation makes the first example slow; time is no subject of these tests.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.load_profile("default")


# Compiled programs are shared by the workers, and by the processes that tests
# start: many tests compile the same ones.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="optax_svrg_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
for name, value in {
  "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
  os.environ[name.upper()] = str(value)
  jax.config.update(name, value)  # JAX may have read its environment already.


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
  """Implicit promotion of dtypes and ranks is an error."""
  if request.node.get_closest_marker("standard_promotion"):
    yield
  else:
    with (
      jax.numpy_dtype_promotion("strict"),
      jax.numpy_rank_promotion("raise"),
    ):
      yield


@pytest.fixture
def x64() -> Iterator[None]:
  """Double precision."""
  with jax.enable_x64(True):
    yield
