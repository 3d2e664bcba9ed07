# SPDX-License-Identifier: Apache-2.0
"""Problems and assertions shared by all tests."""

from collections.abc import Callable, Iterator, Sequence
import gzip
import os
import pathlib
import socket
import struct
import subprocess
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg


def _params(dtype: Any) -> dict[str, Any]:
  """Nested containers, a scalar, a None leaf."""
  values = np.linspace(-1.0, 2.0, 6)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    values = values * (1 + 0.5j)
  return {
    "matrix": jnp.asarray(values.reshape(2, 3), dtype),
    "list": [jnp.asarray(values[:2], dtype), None],
    "tuple": (jnp.asarray(values[3], dtype),),
  }


# Name to (make parameters, whether double precision is needed).
TREES: dict[str, tuple[Callable[[], Any], bool]] = {
  "mixed": (
    lambda: {
      "a": _params(jnp.float32),
      "b": jnp.asarray([[0.7, -1.3]], jnp.bfloat16),
    },
    False,
  ),
  "complex64": (lambda: _params(jnp.complex64), False),
  "float64": (lambda: _params(jnp.float64), True),
  "numpy": (lambda: {"w": np.ones((2, 2), np.float32), "v": 2.0}, False),
  "float16": (lambda: _params(jnp.float16), False),
  "complex128": (lambda: _params(jnp.complex128), True),
  "array": (lambda: jnp.arange(3.0), False),
  "empty": (dict, False),
  "nnx_state": (
    lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    False,
  ),
}
_FAST_TREES = ("mixed", "complex128", "numpy")


def slow(*values: Any) -> Any:
  """Parameters of a test in the slow tier."""
  return pytest.param(*values, marks=pytest.mark.slow)


def tree_names(*fast: str, without: Sequence[str] = ()) -> list[Any]:
  """Names of ``TREES`` as parameters of a test.

  Args:
    *fast: those of the fast tier, if not all that are representative.
    without: names to leave out.
  """
  return [
    name if name in (fast or _FAST_TREES) else slow(name)
    for name in TREES
    if name not in without
  ]


# All that may be given as the coefficient 0.5.
HALVES: list[Any] = [
  0.5,
  np.float64(0.5),
  np.array(0.5),
  jnp.array(0.5),
  jnp.array(0.5, jnp.bfloat16),
  lambda _: 0.5,
  lambda _: jnp.array(0.5, jnp.bfloat16),
]


class FiniteSum(NamedTuple):
  """Gradients that are affine in the parameters, for trees of any form.

  The gradient of example (a, b) in leaf number k is a * (params + k) + b.
  """

  batches: Sequence[tuple[jax.Array, jax.Array]]

  @staticmethod
  def grad(params: Any, batch: Any) -> Any:
    """Mean gradient over a batch."""
    leaves, treedef = jax.tree.flatten(params)
    grads = []
    for k, x in enumerate(leaves):
      a, b = (jnp.mean(values.astype(_dtype(x))) for values in batch)
      grads.append(a * (x + k) + b)
    return jax.tree.unflatten(treedef, grads)

  @property
  def data(self) -> tuple[jax.Array, jax.Array]:
    """The whole data set as one batch."""
    return tuple(jnp.concatenate(x) for x in zip(*self.batches, strict=True))

  def full_grad(self, params: Any) -> Any:
    """Mean gradient over all examples."""
    return self.grad(params, self.data)


def finite_sum(sizes: Sequence[int], seed: int = 0) -> FiniteSum:
  """A problem with batches of the given sizes, in JAX's default precision."""
  rng = np.random.default_rng(seed)
  return FiniteSum(
    [
      tuple(jnp.asarray(rng.normal(size=n), float) for _ in range(2))
      for n in sizes
    ]
  )


def network_loss(params: Any, batch: Any) -> jax.Array:
  """Mean square error of a perceptron with one hidden layer."""
  x, y = batch["x"], batch["y"]
  hidden = jnp.tanh(x @ params["w"])
  return jnp.mean((hidden @ params["v"] - y) ** 2)


def network_data(n: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
  """Examples for :func:`network_loss`."""
  rng = np.random.default_rng(seed)
  return {
    "x": jnp.asarray(rng.normal(size=(n, 3)), dtype),
    "y": jnp.asarray(rng.normal(size=n), dtype),
  }


def network_params(dtype: Any = jnp.float32) -> Any:
  """Parameters for :func:`network_loss`."""
  rng = np.random.default_rng(1)
  return {
    "w": jnp.asarray(rng.normal(size=(3, 4)), dtype),
    "v": jnp.asarray(rng.normal(size=4), dtype),
  }


def _dtype(x: Any) -> Any:
  return jnp.result_type(x)


def perturbed(tree: Any, by: float = 0.25) -> Any:
  """Parameters other than the snapshot, in the same dtypes."""
  return jax.tree.map(
    lambda x: (
      jnp.asarray(x) * jnp.asarray(1 + by, _dtype(x))
      + jnp.asarray(by, _dtype(x))
    ),
    tree,
  )


def random_like(params: Any, seed: int, scale: float = 1.0) -> Any:
  """A tree of normal numbers, complex where the parameters are."""
  rng = np.random.default_rng(seed)

  def draw(p):
    values = rng.normal(size=(2, *jnp.shape(p)))
    dtype = jnp.result_type(p)
    z = values[0] + (1j if jnp.iscomplexobj(p) else 0) * values[1]
    return jnp.asarray(scale * z, dtype)

  return jax.tree.map(draw, params)


def flat(tree: Any) -> np.ndarray:
  """All components in one vector, in double precision."""
  leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(tree)]
  wide = [
    x.astype(np.complex128 if np.iscomplexobj(x) else float) for x in leaves
  ]
  return np.concatenate([np.zeros(0), *wide])


def leaves_with_names(tree: Any) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path), leaf


def assert_equal(got: Any, want: Any) -> None:
  """The same structure and dtypes, and values equal to the last bit."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (name, g), w in zip(
    leaves_with_names(got), jax.tree.leaves(want), strict=True
  ):
    g, w = np.asarray(g), np.asarray(w)
    assert g.dtype == w.dtype, name
    assert g.tobytes() == w.tobytes(), f"{name}: {g} is not {w}"


def assert_close(got: Any, want: Any, rtol: float, atol: float = 0.0) -> None:
  """Tolerances as in numpy, relative to the largest entry of each leaf."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (name, g), w in zip(
    leaves_with_names(got), jax.tree.leaves(want), strict=True
  ):
    g, w = (
      np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else float)
      for x in (g, w)
    )
    assert g.shape == w.shape, name
    scale = np.max(np.abs(w), initial=0.0)
    np.testing.assert_allclose(
      g, w, rtol=0, atol=rtol * scale + atol, err_msg=name
    )


def wide(tree: Any) -> Any:
  """The tree as NumPy arrays in double precision."""
  return jax.tree.map(
    lambda x: np.asarray(x).astype(complex if jnp.iscomplexobj(x) else float),
    tree,
  )


def assert_rounded(got: Any, want: Any, sizes: Any, ulps: float) -> None:
  """Equal up to some roundings, each leaf to those of its own dtype.

  Args:
    got: the tree to check.
    want: what it should be, in double precision.
    sizes: the tree of the magnitudes of what each number was summed of.
    ulps: number of roundings of numbers of these magnitudes.
  """
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (name, g), w, size in zip(
    leaves_with_names(got), *map(jax.tree.leaves, (want, sizes)), strict=True
  ):
    bound = ulps * float(jnp.finfo(g.dtype).eps) * size
    error = np.abs(wide(g) - w)
    assert np.all(error <= bound), f"{name}: {error} exceeds {bound}"


def tolerance(tree: Any) -> float:
  """A few roundings of the narrowest dtype in a tree."""
  eps = [float(jnp.finfo(_dtype(x)).eps) for x in jax.tree.leaves(tree)]
  return 16 * max(eps, default=0.0)


def types(tree: Any) -> Any:
  """Structure, shapes, dtypes and weak types, to compare states."""
  return jax.tree.structure(tree), [
    (jnp.shape(x), _dtype(x), getattr(x, "weak_type", None))
    for x in jax.tree.leaves(tree)
  ]


def svrg_state(opt_state: Any) -> optax_svrg.SVRGState:
  """The only SVRGState in an optimizer state."""
  is_state = lambda x: isinstance(x, optax_svrg.SVRGState)
  (state,) = filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))
  return state


def with_snapshot(
  tx: optax.GradientTransformation, params: Any, problem: FiniteSum
) -> Any:
  """The state of ``tx`` after a snapshot at ``params``."""
  return optax_svrg.take_snapshot(
    tx.init(params),
    params,
    lambda p: optax_svrg.mean_gradient(problem.grad, p, problem.batches),
  )


def idx(array):
  """The bytes of an IDX file before compression."""
  header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
  return header + array.astype(np.uint8).tobytes()


def write_gz(path, raw):
  path.write_bytes(gzip.compress(raw))


def in_processes(
  make_command: Callable[[int, int], Sequence[Any]],
  num_processes: int,
  **env: str,
) -> list[tuple[int, str]]:
  """Runs Python in several processes at a time.

  Args:
    make_command: makes the arguments of a process from its number and a free
      port.
    num_processes: how many there are.
    **env: further variables of their environment.

  Returns:
    How each process has ended: exit status and output.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  # On a busy machine devices may be late for a reduction.
  late = "--xla_cpu_collective_call_terminate_timeout_seconds=240"
  inherited = {**os.environ, "XLA_FLAGS": late}
  workers = [
    subprocess.Popen(
      [sys.executable, *map(str, make_command(process, port))],
      cwd=pathlib.Path(__file__).parents[1],
      env=inherited | env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(num_processes)
  ]
  try:
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  return [
    (worker.returncode, output)
    for worker, output in zip(workers, outputs, strict=True)
  ]
