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
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  # Where JAX has read its environment already.
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line(
    "markers",
    "standard_promotion: the test runs code of others, e.g. optax.adam, which"
    " fails under strict dtype promotion",
  )


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
