# SPDX-License-Identifier: Apache-2.0
"""Prints the least versions that the library allows, as constraints of pip."""

import pathlib
import tomllib

_ROOT = pathlib.Path(__file__).parents[1]
_EXTRAS = ("flax", "sklearn")  # Those that the library imports.

_project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_bounds = list(_project["dependencies"])
for _extra in _EXTRAS:
  _bounds += _project["optional-dependencies"][_extra]
print(*(bound.replace(">=", "==") for bound in _bounds), sep="\n")
