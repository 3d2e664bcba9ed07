# SPDX-License-Identifier: Apache-2.0
"""The README is short, its example runs, its links are absolute."""

import pathlib
import re

import optax
import pytest
from sklearn.datasets import load_digits

import optax_svrg

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.standard_promotion
def test_the_example_trains():
  code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
  assert code.count("\n") <= 20
  namespace = {"__name__": "readme"}
  exec(compile(code, "README.md", "exec"), namespace)
  loss, w, x, y = (namespace[name] for name in ("loss", "w", "x", "y"))
  before, after = loss(0 * w, x, y), loss(w, x, y)
  assert after < 0.5 * before


@pytest.mark.standard_promotion
def test_the_linear_probe_predicts():
  _, code = re.findall(r"```python\n(.*?)```", README, re.S)
  images, classes = load_digits(return_X_y=True)
  namespace = {
    **{"optax": optax, "optax_svrg": optax_svrg},
    **{"features": images[:1500] / 16, "labels": classes[:1500]},
    "new_features": images[1500:] / 16,
  }
  exec(compile(code, "README.md", "exec"), namespace)
  assert namespace["fit"].converged
  assert (namespace["predictions"] == classes[1500:]).mean() > 0.9


def test_it_is_one_screen():
  assert README.count("\n") <= 120


def test_set_up_is_two_commands():
  _, main_job, tests = re.findall(r"```sh\n(.*?)```", README, re.S)
  assert main_job.endswith("&& python -m benchmarks train\n")
  assert tests == ('python -m pip install -e ".[test]" && python -m pytest\n')


def test_links_work_on_pypi():
  links = re.findall(r"\]\(([^)]*)\)", README)
  assert links
  assert all(link.startswith("https://") for link in links)


def test_files_that_it_links_exist():
  pattern = r"optax_svrg/(?:blob/)?main/([^)\s]*)"
  paths = re.findall(pattern, README)
  assert len(paths) >= 4
  for path in paths:
    assert (ROOT / path).is_file(), path
