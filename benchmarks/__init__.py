# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the package: ``python -m benchmarks --help``."""


class UserError(Exception):
  """Input that cannot be used; the message is one line, shown as it is."""
