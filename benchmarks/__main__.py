# SPDX-License-Identifier: Apache-2.0
"""Runs ``python -m benchmarks``."""

import sys

if __name__ == "__main__":
  try:
    from benchmarks import cli
  except ModuleNotFoundError as error:
    print(
      f"Error: the package {error.name!r} is missing:"
      ' pip install "optax-svrg[benchmarks]".',
      file=sys.stderr,
    )
    sys.exit(2)
  cli.main(prog_name="python -m benchmarks")
