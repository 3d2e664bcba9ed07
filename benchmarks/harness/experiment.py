# SPDX-License-Identifier: Apache-2.0
"""Configuration of one training, and what comes out of it."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import math
from typing import Any, NamedTuple

Settings = Mapping[str, Any]  # Arguments by name, as JSON has them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Configuration of one training: everything its result follows from.

  Fields are numbers, strings, ``None``, or mappings of these; equality and hash
  are those of :meth:`identity`.

  Attributes:
    dataset: name of the data set.
    model: name of the model, a key of :data:`benchmarks.models.MODELS`.
    method: name of the method, a key of :data:`benchmarks.methods.METHODS`.
    optimizer: name of the optimizer, a key of
      :data:`benchmarks.harness.program.OPTIMIZERS`.
    epochs: number of epochs.
    batch_size: examples of a batch, of all devices.
    lr: peak learning rate.
    seed: seed of the initial weights and of the batches.
    feed: ``"arrays"``, all examples in the memory of the device; or
      ``"streams"``, images read ahead and augmented by the paper's recipe.
    train_examples: how many are used; ``None`` for all.
    validation_examples: how many are used; ``None`` for all.
    label_noise: share of the training labels that are drawn at random.
    augment: augmentation of the feed ``"arrays"``.
    image_size: height and width of the images of ``"streams"`` in pixels.
    model_settings: arguments of the model.
    method_settings: arguments of the method.
    schedule: ``"cosine"`` or ``"constant"``.
    warmup_epochs: epochs during which the learning rate rises; ``None`` for a
      tenth of all steps.
    final_lr_share: learning rate at the end of the cosine, relative to ``lr``.
    snapshot_every: epochs between snapshots.
    keeps_table: whether ``"streams"`` keeps the gradients at the snapshot from
      the pass, instead of computing them again.
    measure: observers by name, a key of
      :data:`benchmarks.harness.observers.OBSERVERS`, with their settings.
    data_sha256: SHA-256 of the data; empty where the name of the data set says
      it all.
  """

  dataset: str
  model: str
  method: str
  optimizer: str
  epochs: int
  batch_size: int
  lr: float
  seed: int = 0
  feed: str = "arrays"
  train_examples: int | None = None
  validation_examples: int | None = None
  label_noise: float = 0.0
  augment: str = "none"
  image_size: int | None = None
  model_settings: Settings = dataclasses.field(default_factory=dict)
  method_settings: Settings = dataclasses.field(default_factory=dict)
  schedule: str = "cosine"
  warmup_epochs: int | None = None
  final_lr_share: float = 0.0
  snapshot_every: int = 1
  keeps_table: bool = True
  measure: Settings = dataclasses.field(default_factory=dict)
  data_sha256: str = ""

  def identity(self) -> dict[str, Any]:
    """Returns all fields as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

  @classmethod
  def from_identity(cls, identity: Mapping[str, Any]) -> "Experiment":
    """Makes an experiment from :meth:`identity`.

    Fields that are missing get their defaults: they were added later.
    """
    return cls(**identity)

  @property
  def key(self) -> str:
    """Hash of all fields but those with their defaults, in hexadecimal."""
    defaults = Experiment(**dict.fromkeys(_REQUIRED)).identity()
    changed = {
      name: value
      for name, value in self.identity().items()
      if name in _REQUIRED or value != defaults[name]
    }
    text = json.dumps(changed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  @property
  def name(self) -> str:
    """A readable and unique name, for a file."""
    parts = (self.dataset, self.model, self.optimizer, self.method)
    text = "-".join(parts).replace(" ", "-").replace("/", "-")
    return f"{text}-lr{self.lr:g}-seed{self.seed}-{self.key}"

  def replace(self, **changes: Any) -> "Experiment":
    """Returns a copy with other fields."""
    return dataclasses.replace(self, **changes)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Experiment):
      return NotImplemented
    return self.identity() == other.identity()

  def __hash__(self) -> int:
    return hash(self.key)


_REQUIRED = tuple(
  field.name
  for field in dataclasses.fields(Experiment)
  if field.default is dataclasses.MISSING
  and field.default_factory is dataclasses.MISSING
)


class Point(NamedTuple):
  """State of a run after an epoch.

  Attributes:
    epoch: number of epochs trained.
    train_loss: mean loss over all training examples; with the feed
      ``"streams"`` over the steps of the epoch, of augmented images.
    validation_accuracy: share of the validation examples classified correctly.
    gradients_per_example: gradients of single examples evaluated so far,
      divided by the number of training examples.
    seconds: time spent in training so far.
    alpha: mean of the coefficient over the steps of the epoch; ``None`` before
      the first epoch.
    validation_loss: mean loss over the validation examples; ``None`` with the
      feed ``"streams"``.
    variance_ratio: mean square distance of the corrected gradient from the mean
      gradient of the snapshot, divided by that of the plain gradient, over the
      steps of the epoch; ``None`` without a snapshot. An upper bound, as far as
      it is below 1, of the ratio of their variances.
  """

  epoch: int
  train_loss: float
  validation_accuracy: float
  gradients_per_example: float
  seconds: float
  alpha: float | None = None
  variance_ratio: float | None = None
  validation_loss: float | None = None


@dataclasses.dataclass
class Run:
  """One training.

  Attributes:
    experiment: its configuration.
    history: the state before the first epoch (of the feed ``"arrays"``) and
      after each epoch.
    finished: whether all epochs were trained.
    measured: results of observers, as JSON.
    origin: data, commit, versions and machine; empty unless it was stored.
  """

  experiment: Experiment
  history: list[Point] = dataclasses.field(default_factory=list)
  finished: bool = False
  measured: dict[str, Any] = dataclasses.field(default_factory=dict)
  origin: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def method(self) -> str:
    """Name of the method."""
    return self.experiment.method

  @property
  def seed(self) -> int:
    """The seed."""
    return self.experiment.seed

  @property
  def last(self) -> Point:
    """The state after the last epoch trained."""
    return self.history[-1]

  @property
  def diverged(self) -> bool:
    """True if the train loss ever was infinite or not a number."""
    return not all(math.isfinite(point.train_loss) for point in self.history)

  def as_json(self) -> dict[str, Any]:
    """Returns the run as JSON, numbers that are not finite as ``null``."""
    return {
      "experiment": self.experiment.identity(),
      "finished": self.finished,
      "diverged": self.diverged,
      "history": finite([point._asdict() for point in self.history]),
      "measured": finite(self.measured),
      **self.origin,
    }

  @classmethod
  def from_json(cls, saved: Mapping[str, Any]) -> "Run":
    """Makes a run from :meth:`as_json`."""
    own = ("experiment", "finished", "diverged", "history", "measured")
    return cls(
      Experiment.from_identity(saved["experiment"]),
      [point_from_json(point) for point in saved["history"]],
      saved["finished"],
      saved["measured"],
      {name: value for name, value in saved.items() if name not in own},
    )


def point_from_json(saved: Mapping[str, Any]) -> Point:
  """Makes a point, with NaN where a number was not finite."""
  point = Point(**saved)
  return point._replace(
    **{
      name: math.nan
      for name in ("train_loss", "validation_accuracy")
      if getattr(point, name) is None
    }
  )


def finite(x: Any) -> Any:
  """Returns a tree of JSON with ``None`` for numbers that are not finite."""
  if isinstance(x, Mapping):
    return {name: finite(value) for name, value in x.items()}
  if isinstance(x, list | tuple):
    return [finite(value) for value in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x
