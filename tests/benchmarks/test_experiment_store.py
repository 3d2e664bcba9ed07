# SPDX-License-Identifier: Apache-2.0
"""Experiments, and runs that are stored by them."""

import dataclasses
import json
import math

import pytest

import benchmarks
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.store import Store, write_json

EXPERIMENT = Experiment(
  dataset="mnist-5k",
  model="mlp2",
  method="plain",
  optimizer="sgd",
  epochs=2,
  batch_size=10,
  lr=0.1,
)


def other_value(value):
  """Another value that a field can have."""
  if value is None:
    return 7
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return f"{value}x"
  return {"name": [1, 2]} if isinstance(value, dict) else value + 1


def make_run(experiment=EXPERIMENT):
  history = [Point(0, 2.0, 0.1, 0.0, 0.0), Point(1, math.nan, 0.2, 1.0, 0.5, 1)]
  return Run(experiment, history, True, {"width": 3, "lost": math.inf})


@pytest.mark.parametrize(
  "field", [field.name for field in dataclasses.fields(Experiment)]
)
def test_every_field_tells_experiments_apart(field, tmp_path):
  changed = EXPERIMENT.replace(
    **{field: other_value(getattr(EXPERIMENT, field))}
  )
  assert changed != EXPERIMENT
  assert changed.key != EXPERIMENT.key
  store = Store(tmp_path)
  store.put(make_run())
  assert store.get(EXPERIMENT) is not None
  assert store.get(changed) is None


def test_an_experiment_is_its_identity():
  given = EXPERIMENT.replace(model_settings={"widths": (1, 2)})
  same = Experiment(**json.loads(json.dumps(given.identity())))
  assert same == given
  assert hash(same) == hash(given)
  assert same.name == given.name
  assert EXPERIMENT != "an experiment"


def test_fields_that_are_added_later_have_their_defaults():
  identity = EXPERIMENT.identity()
  del identity["measure"]
  assert Experiment(**identity) == EXPERIMENT


def test_a_number_that_is_not_finite_is_no_configuration():
  with pytest.raises(ValueError, match="JSON"):
    EXPERIMENT.replace(lr=math.nan).identity()


def test_a_run_comes_back_with_commit_versions_and_machine(tmp_path):
  store = Store(tmp_path)
  assert store.get(EXPERIMENT) is None
  run = make_run()
  store.put(run)
  found = store.get(EXPERIMENT)
  assert found.experiment == EXPERIMENT
  assert found.finished
  assert found.diverged
  assert found.history[0] == run.history[0]
  # JSON has no NaN; one line reads as it was written.
  assert math.isnan(found.history[1].train_loss)
  assert found.history[1]._replace(train_loss=0) == run.history[1]._replace(
    train_loss=0
  )
  assert found.measured == {"width": 3, "lost": None}
  assert {"commit", "versions", "machine"} <= found.origin.keys()
  assert found.origin["versions"]["jax"]


def test_a_run_of_another_configuration_is_never_returned(tmp_path):
  """Even where it has the name of the file."""
  store = Store(tmp_path)
  store.put(make_run())
  path = store.path(EXPERIMENT)
  saved = json.loads(path.read_text())
  saved["experiment"]["batch_size"] = 11
  path.write_text(json.dumps(saved))
  assert store.get(EXPERIMENT) is None


@pytest.mark.parametrize(
  "content", ["", "{}", "[1]", '{"experiment": {"epoch": 1}}']
)
def test_a_damaged_file_is_an_error_in_one_line(content, tmp_path):
  store = Store(tmp_path)
  store.path(EXPERIMENT).write_text(content)
  with pytest.raises(benchmarks.UserError, match="holds no run") as error:
    store.get(EXPERIMENT)
  assert "\n" not in str(error.value)
  assert str(store.path(EXPERIMENT)) in str(error.value)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(benchmarks.UserError, match="Not a directory"):
    Store(tmp_path / "file" / "folder").put(make_run())


def test_json_is_replaced_as_a_whole(tmp_path):
  path = tmp_path / "results.json"
  write_json(path, {"a": 1})
  with pytest.raises(ValueError, match="JSON"):
    write_json(path, {"a": math.nan})
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path]
