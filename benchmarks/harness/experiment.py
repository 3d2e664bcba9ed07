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
  """

  dataset: str
  model: str  # A key of `benchmarks.models.MODELS`.
  method: str  # A key of `benchmarks.methods.METHODS`.
  optimizer: str  # A key of `benchmarks.harness.program.OPTIMIZERS`.
  epochs: int
  batch_size: int  # Examples of a batch, of all devices.
  lr: float  # Peak learning rate.
  seed: int = 0  # Of the initial weights and of the batches.
  # "arrays", all examples in the memory of the device; or "streams", images
  # read ahead and augmented by the paper's recipe.
  feed: str = "arrays"
  train_examples: int | None = None  # How many are used; `None` for all.
  validation_examples: int | None = None
  label_noise: float = 0.0  # Share of the training labels drawn at random.
  augment: str = "none"  # Augmentation of the feed "arrays".
  image_size: int | None = None  # Height and width of "streams", in pixels.
  model_settings: Settings = dataclasses.field(default_factory=dict)
  method_settings: Settings = dataclasses.field(default_factory=dict)
  schedule: str = "cosine"  # Or "constant".
  # Epochs in which the learning rate rises; `None` for a tenth of all steps.
  warmup_epochs: int | None = None
  final_lr_share: float = 0.0  # At the end of the cosine, relative to `lr`.
  snapshot_every: int = 1  # Epochs between snapshots.
  # Whether "streams" keeps the gradients at the snapshot from the pass, instead
  # of computing them again.
  keeps_table: bool = True
  # Settings of `benchmarks.harness.observers.Variance` as "variance", if any.
  measure: Settings = dataclasses.field(default_factory=dict)
  data_sha256: str = ""  # Empty where the name of the data set says it all.

  def identity(self) -> dict[str, Any]:
    """Returns all fields as JSON has them.

    They make the experiment again; those added later have their defaults.
    """
    return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

  @property
  def key(self) -> str:
    """Hash of all fields but those with their defaults, in hexadecimal."""
    values = self.identity().values()
    changed = {
      field.name: value
      for field, value in zip(dataclasses.fields(self), values, strict=True)
      if value not in (field.default, {})
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
    is_experiment = isinstance(other, Experiment)
    return is_experiment and self.identity() == other.identity()

  def __hash__(self) -> int:
    return hash(self.key)


class Point(NamedTuple):
  """State of a run after an epoch.

  ``variance_ratio`` is the mean square distance of the corrected gradient from
  the mean gradient of the snapshot, divided by that of the plain gradient. An
  upper bound, as far as it is below 1, of the ratio of their variances.
  """

  epoch: int  # Number of epochs trained.
  # Over all training examples; with the feed "streams" over the steps of the
  # epoch, of augmented images.
  train_loss: float
  validation_accuracy: float  # Share classified correctly.
  # Gradients of single examples evaluated so far, divided by the number of
  # training examples.
  gradients_per_example: float
  seconds: float  # Time spent in training so far.
  # Mean coefficient over the steps of the epoch; `None` before the first one.
  alpha: float | None = None
  variance_ratio: float | None = None  # Over them; `None` without a snapshot.
  validation_loss: float | None = None  # `None` with the feed "streams".

  @classmethod
  def from_json(cls, saved: Mapping[str, Any]) -> "Point":
    """Makes a point, with NaN where a number was not finite."""
    names = ("train_loss", "validation_accuracy")
    lost = {name: math.nan for name in names if saved[name] is None}
    return cls(**{**saved, **lost})


_START = Point(0, math.nan, math.nan, 0.0, 0.0)


@dataclasses.dataclass
class Run:
  """One training."""

  experiment: Experiment
  # Before the first epoch (of the feed "arrays") and after each epoch.
  history: list[Point] = dataclasses.field(default_factory=list)
  finished: bool = False  # Whether all epochs were trained.
  # Results of observers, as JSON.
  measured: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Data, commit, versions and machine; empty unless it was stored.
  origin: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def last(self) -> Point:
    """The state after the last epoch trained; without losses before it."""
    return self.history[-1] if self.history else _START

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
      Experiment(**saved["experiment"]),
      list(map(Point.from_json, saved["history"])),
      saved["finished"],
      saved["measured"],
      {name: value for name, value in saved.items() if name not in own},
    )


def finite(x: Any, digits: int = 17) -> Any:
  """Returns JSON, with ``None`` for numbers that are not finite.

  Others have this number of significant digits, by default all.
  """
  if isinstance(x, Mapping):
    return {name: finite(value, digits) for name, value in x.items()}
  if isinstance(x, list | tuple):
    return [finite(value, digits) for value in x]
  if not isinstance(x, float):
    return x
  return float(f"{x:.{digits}g}") if math.isfinite(x) else None
