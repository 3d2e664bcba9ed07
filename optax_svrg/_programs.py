# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that live as long as the function they were made of."""

from collections.abc import Callable, Hashable
import inspect
from typing import Any, NamedTuple
import warnings
import weakref


class _Uses:
  """Number of times a program was requested."""

  def __init__(self) -> None:
    self.count = 0


class _Program(NamedTuple):
  run: Any
  uses: _Uses


# By the id of a function, or of the object that a bound method belongs to.
_programs: dict[int, dict[Hashable, _Program]] = {}
# Of the last program made of each piece of code, to notice functions that are
# made again and again.
_last_uses: weakref.WeakKeyDictionary[Any, dict[Hashable, _Uses]] = (
  weakref.WeakKeyDictionary()
)
_warned_of: weakref.WeakSet[Any] = weakref.WeakSet()


class _Reference(NamedTuple):
  """A weak reference to a function.

  Attributes:
    owner: the function, or the object that a bound method belongs to.
    get: returns the function, ``None`` once it is gone.
  """

  owner: Any
  get: Callable[[], Any]


def program(
  fn: Callable[..., Any],
  key: Hashable,
  make: Callable[[Callable[..., Any]], Any],
  *,
  warn_level: int = 0,
) -> Any:
  """Returns ``make(fn)``, the same object as long as ``fn`` is alive.

  A cache of :func:`jax.jit` functions that keeps neither ``fn`` nor what it
  closes over alive. Functions are told apart by identity, so they need not be
  hashable.

  Args:
    fn: the function; it must be alive whenever the result is called.
    key: what else the result depends on.
    make: makes the result from a function that calls ``fn``.
    warn_level: number of calls between the user's line and this one, to warn
      there of functions made for a single use; 0 for no warning.
  """
  reference = _reference(fn)
  if reference is None:  # Cannot be referred to weakly.
    return make(fn)
  owned = _programs.get(id(reference.owner))
  if owned is None:
    owned = _programs[id(reference.owner)] = {}
    forget = weakref.finalize(
      reference.owner, _programs.pop, id(reference.owner), None
    )
    forget.atexit = False
  full_key = (getattr(fn, "__func__", None), key)
  if full_key not in owned:
    get = reference.get

    def call(*args: Any, **kwargs: Any) -> Any:
      return get()(*args, **kwargs)

    owned[full_key] = _Program(make(call), _Uses())
    if warn_level:
      _warn_if_made_again(fn, key, owned[full_key].uses, warn_level + 2)
  owned[full_key].uses.count += 1
  return owned[full_key].run


def _reference(fn: Callable[..., Any]) -> _Reference | None:
  try:
    if inspect.ismethod(fn):
      return _Reference(fn.__self__, weakref.WeakMethod(fn))
    return _Reference(fn, weakref.ref(fn))
  except TypeError:
    return None


def _warn_if_made_again(
  fn: Callable[..., Any], key: Hashable, uses: _Uses, stacklevel: int
) -> None:
  """Warns, once for each piece of code, of functions made for a single use."""
  code = getattr(inspect.unwrap(fn), "__code__", None)
  if code is None or inspect.ismethod(fn):
    return
  of_code = _last_uses.setdefault(code, {})
  before, of_code[key] = of_code.get(key), uses
  if before is not None and before.count == 1 and code not in _warned_of:
    _warned_of.add(code)
    warnings.warn(
      f"grad_fn is a new function object in each call ({code.co_qualname} in"
      f" {code.co_filename}, line {code.co_firstlineno}), so it is compiled"
      " each time. Make it once, outside of the training loop, and pass values"
      " that change through jax.tree_util.Partial(fn, values).",
      stacklevel=stacklevel,
    )
