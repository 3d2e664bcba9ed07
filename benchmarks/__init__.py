# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the package: ``python -m benchmarks --help``."""


class UserError(Exception):
  """Input that cannot be used; the message is one line, shown as it is."""


def one_line(error: Exception) -> str:
  """Says what went wrong, without the path and a full stop."""
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  return text.partition("\n")[0].rstrip(".")
