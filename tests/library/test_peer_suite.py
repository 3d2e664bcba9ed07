# SPDX-License-Identifier: Apache-2.0
"""Optax's own suites for contributed optimizers, as shipped in its wheel.

They are run untouched, but for the table of the optimizers under test, with
plain SGD and with alpha_svrg or adaptive_saga before it: these may fail nothing
that the first passes.
"""

import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import optax
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Inserted before the first test class. FACTORY is peer_adapter.<name>.
TABLES = {
  "contrib/_common_test.py": """
_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = ({
    'opt_name': 'sophia', 'opt_kwargs': {'learning_rate': 1e-3},
    'wrapper_name': None, 'wrapper_kwargs': None},)
_get_opt_factory = lambda opt_name: FACTORY
""",
  "_src/alias_test.py": """
_OPTIMIZERS_UNDER_TEST = (
    {'opt_name': 'sgd', 'opt_kwargs': {'learning_rate': 1e-3}},)
_get_opt = lambda self, opt_name: (
    FACTORY if opt_name == 'sgd' else getattr(alias, opt_name))
""",
  "_src/sharding_test.py": """
OPTIMIZERS = {'candidate': FACTORY(1.0)}
jax.__version__ = '0.9'  # Optax 0.2.8 compares versions as strings.
""",
}
# Test classes that use the table.
CLASSES = ("ContribTest", "AliasTest", "ShardingTest")


def run(suite: str, factory: str, folder: pathlib.Path) -> dict[str, str]:
  """Outcome of each test of a suite with one optimizer in its table."""
  source = (pathlib.Path(optax.__file__).parent / suite).read_text()
  head, body = source.split("\nclass ", 1)
  table = TABLES[suite].replace("FACTORY", f"peer_adapter.{factory}")
  path = folder / f"test_{factory}.py"
  path.write_text(
    f"{head}\nfrom tests.workers import peer_adapter\n{table}\n\nclass {body}"
  )
  report = folder / f"{factory}.xml"
  command = [sys.executable, "-m", "pytest", path, f"--junit-xml={report}"]
  command += ["-q", "-p", "no:cacheprovider", "-k", " or ".join(CLASSES)]
  subprocess.run(
    command,
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.DEVNULL,
    timeout=600,
    check=False,  # Some tests may fail with plain SGD as well.
  )
  outcomes = {}
  for case in ElementTree.parse(report).iter("testcase"):
    kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
    outcomes[case.get("name")] = kinds.pop() if kinds else "passed"
  return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("suite", TABLES)
def test_passes_what_sgd_passes(suite, tmp_path):
  reference = run(suite, "plain", tmp_path)
  passed = {name for name, kind in reference.items() if kind == "passed"}
  assert len(passed) >= 3
  for factory in ("alpha_svrg", "adaptive_saga"):
    candidate = run(suite, factory, tmp_path)
    assert {name: candidate.get(name) for name in passed} == dict.fromkeys(
      passed, "passed"
    ), factory
