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
"""Checks of arguments and dtypes shared by all modules.

Every check runs on shapes and dtypes alone, so that it works on tracers and
costs nothing in a compiled step.
"""

from collections.abc import Sequence
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, int, float, complex)

_keystr = jax.tree_util.keystr


def is_masked(node: Any) -> bool:
  """Whether a tree node is the placeholder that ``optax.masked`` leaves."""
  return isinstance(node, optax.MaskedNode)


def path_of(path: Any) -> str:
  """A key path as the user would write it; the root of a tree has no path."""
  return f"at {_keystr(path)}" if path else "at the root"


def dtype_kind(dtype: Any) -> str:
  """Whether a dtype is complex or real; integers are of their own kinds."""
  for kind in (jnp.complexfloating, jnp.floating):
    if jnp.issubdtype(dtype, kind):
      return kind.__name__
  return str(dtype)


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array, ``jax.ShapeDtypeStruct`` or Python number."""
  return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def wide_dtype(dtype: Any) -> Any:
  """The dtype to form sums in: float32 for narrower ones."""
  # Not jnp.promote_types, which refuses under strict dtype promotion.
  return np.promote_types(dtype, np.float32)


def device_memory(device: jax.Device) -> int | None:
  """The free bytes of a device, all bytes of a host; None if not known."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return host_memory() if device.platform == "cpu" else None


def host_memory() -> int | None:
  """The bytes of this machine; None if not known."""
  if hasattr(os, "sysconf"):
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return None


def check_inexact(tree: Any, name: str) -> None:
  """Raises TypeError at the first leaf that has no gradient."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = dtype_of(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"{name} must have float or complex leaves, got {dtype}"
        f"{list(np.shape(leaf))} {path_of(path)}. Keep such leaves out of"
        f" {name}, e.g. let the loss close over them."
      )


def as_dtype(dtype: Any, name: str) -> Any:
  """Returns a float or complex dtype, or None; raises TypeError for others.

  Args:
    dtype: anything that names a dtype, or ``None``.
    name: what to call it in the message.
  """
  if dtype is None:
    return None
  try:
    canonical = jax.dtypes.canonicalize_dtype(dtype)
  except TypeError as e:
    raise TypeError(f"{name} must be a dtype, got {dtype!r}.") from e
  if not jnp.issubdtype(canonical, jnp.inexact):
    raise TypeError(
      f"{name} must be a float or complex dtype, got {canonical}."
    )
  return canonical


def check_dtype_fits(params: Any, dtype: Any, name: str) -> None:
  """Raises ValueError if a dtype, unless ``None``, drops imaginary parts."""
  if dtype is None:
    return
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if dtype_kind(dtype_of(leaf)) != dtype_kind(dtype):
      raise ValueError(
        f"{name}={dtype} cannot hold parameters of dtype {dtype_of(leaf)}"
        f" {path_of(path)}."
      )


def check_same_tree(got: Any, want: Any, got_name: str, want_name: str) -> None:
  """Raises ValueError unless two trees agree in structure, shape, dtype kind.

  Args:
    got: the tree to check, with array-like leaves.
    want: the tree that it must match.
    got_name: what to call ``got`` in the message.
    want_name: what to call ``want`` in the message.
  """
  got_leaves = jax.tree_util.tree_leaves_with_path(got)
  want_leaves = jax.tree_util.tree_leaves_with_path(want)
  got_def: Any = jax.tree.structure(got)
  want_def: Any = jax.tree.structure(want)
  if got_def != want_def:
    got_paths = [_keystr(path) for path, _ in got_leaves]
    want_paths = [_keystr(path) for path, _ in want_leaves]
    missing = [p for p in want_paths if p not in set(got_paths)]
    extra = [p for p in got_paths if p not in set(want_paths)]
    if missing or extra:
      detail = "; ".join(
        f"{what} {', '.join(p or 'a bare leaf' for p in paths[:3])}"
        + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        for what, paths in (("missing", missing), ("unexpected", extra))
        if paths
      )
    else:
      detail = f"other containers: {got_def} instead of {want_def}"
    raise ValueError(
      f"{got_name} must have the tree structure of {want_name}: {detail}."
    )
  for (path, g), (_, w) in zip(got_leaves, want_leaves, strict=True):
    if np.shape(g) != np.shape(w):
      raise ValueError(
        f"{got_name} must have the shapes of {want_name}, got"
        f" {np.shape(g)} instead of {np.shape(w)} {path_of(path)}."
      )
    if dtype_kind(dtype_of(g)) != dtype_kind(dtype_of(w)):
      raise ValueError(
        f"{got_name} must have the kinds of dtype of {want_name}, got"
        f" {dtype_of(g)} instead of {dtype_of(w)} {path_of(path)}."
      )


def check_coefficient(value: Any, name: str) -> None:
  """Raises unless ``value`` is one finite real number, as far as is known.

  Args:
    value: a number or array; a tracer is checked by its shape and dtype only.
    name: what to call it in the message.
  """
  if isinstance(value, (bool, np.bool_)) or not isinstance(
    value, (int, float, np.ndarray, np.number, jax.Array)
  ):
    raise TypeError(f"{name} must be a real number, got {value!r}.")
  if jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar, got an array of shape {jnp.shape(value)}."
    )
  dtype = dtype_of(value)
  if not (
    jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
  ):
    raise TypeError(f"{name} must be a real number, got dtype {dtype}.")
  if not isinstance(value, jax.core.Tracer) and not math.isfinite(value):
    raise ValueError(f"{name} must be finite, got {value}.")


def check_decay(value: Any, name: str) -> None:
  """Raises unless ``value`` is a number from 0 to, but without, 1."""
  check_coefficient(value, name)
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_positive(value: Any, name: str) -> None:
  """Raises unless ``value`` is a positive finite number."""
  check_coefficient(value, name)
  if not isinstance(value, jax.core.Tracer) and not value > 0:
    raise ValueError(f"{name} must be positive, got {value}.")


def check_count(value: Any, name: str) -> int:
  """Returns ``value`` as an int; raises unless it is a positive integer."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{name} must be an integer, got {value!r}.")
  if value < 1:
    raise ValueError(f"{name} must be at least 1, got {value}.")
  return int(value)


def check_index(value: Any, name: str) -> Any:
  """Returns ``value``; raises unless it is one integer."""
  if isinstance(value, (bool, np.bool_)) or not isinstance(
    value, (int, np.ndarray, np.integer, jax.Array)
  ):
    raise TypeError(f"{name} must be an integer, got {value!r}.")
  dtype = dtype_of(value)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"{name} must be an integer, got dtype {dtype}.")
  if jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar, got an array of shape {jnp.shape(value)}."
    )
  return value


def wide_index(index: Any) -> jax.Array:
  """An index as an array, which any number of batches can be compared with."""
  index = jnp.asarray(index)
  return index if index.dtype.itemsize >= 4 else index.astype(jnp.int32)


def leading_axes(tree: Any) -> list[tuple[Any, int]]:
  """Path and length of the leading axis of each leaf that has one."""
  return [
    (path, np.shape(leaf)[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if np.ndim(leaf)
  ]


def check_same_size(
  sizes: Sequence[tuple[Any, int]], name: str, of: str
) -> int:
  """Returns the length of all leading axes; raises unless it is the same."""
  first_path, first_size = sizes[0]
  for path, size in sizes:
    if size != first_size:
      raise ValueError(
        f"{name} must have the same number of {of} in all leaves, got"
        f" {first_size} {path_of(first_path)} and {size} {path_of(path)}."
      )
  return first_size


def check_batches(batches: Any) -> None:
  """Raises TypeError for what iterates, but not over batches."""
  # Not by iter(batches): a data loader may start its workers then.
  iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
  if not iterable or isinstance(batches, (dict, str)):
    raise TypeError(
      "batches must be an iterable of batches, got a"
      f" {type(batches).__name__}. For a single batch write [batch]."
    )


def check_batch(batch: Any, name: str) -> int:
  """Returns the number of examples of a batch; raises if it has none."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if not isinstance(leaf, _ARRAY_LIKE):
      raise TypeError(
        f"{name} must be a tree of arrays, got a {type(leaf).__name__}"
        f" {path_of(path)}."
      )
  sizes = leading_axes(batch)
  if not sizes:
    raise ValueError(
      f"{name} must have leaves whose leading axis is the examples, got none in"
      f" {jax.tree.structure(batch)}."
    )
  num_examples = check_same_size(sizes, name, "examples")
  if not num_examples:
    raise ValueError(f"{name} has no examples.")
  return num_examples


def check_varying(tree: Any, axis_name: Any, name: str) -> None:
  """Raises ValueError if gradients were reduced over ``axis_name`` already.

  Under the type checking of ``jax.shard_map`` the gradient of replicated
  parameters is summed over the axis by ``jax.grad`` itself. Averaging it again
  would be a no-op, and the gradient as many times too large as there are
  devices. Where types are not tracked (``pmap``, ``vmap``, ``check_vma=False``)
  nothing is summed implicitly and there is nothing to check.

  Args:
    tree: the gradients.
    axis_name: name of a mapped axis, or a tuple of names.
    name: what to call the gradients in the message.
  """
  tracked = tracked_axes(axis_name)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not tracked <= jax.typeof(leaf).manual_axis_type.varying:
      raise ValueError(
        f"{name} must be device-local with axis_name={axis_name!r}, but"
        f" {path_of(path)} it does not vary over that axis: it has already"
        " been summed. Inside jax.shard_map jax.grad sums the gradient of"
        " replicated parameters; write"
        f" optax_svrg.device_local(jax.grad(loss), {axis_name!r}), which"
        f" differentiates with respect to jax.lax.pcast(params, {axis_name!r},"
        " to='varying'), instead."
      )


def tracked_axes(axis_name: Any) -> frozenset[Any]:
  """Those of the named axes over which types tell whether a value varies.

  Args:
    axis_name: name of a mapped axis, or a tuple of names.

  Raises:
    ValueError: if it is no enclosing axis.
  """
  try:
    axis_index = jax.lax.axis_index(axis_name)
  except NameError as e:
    raise ValueError(
      f"axis_name={axis_name!r} is not an axis of the enclosing"
      " jax.shard_map, jax.pmap or jax.vmap."
    ) from e
  return jax.typeof(axis_index).manual_axis_type.varying
