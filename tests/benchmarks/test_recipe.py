# SPDX-License-Identifier: Apache-2.0
"""The augmentation of the paper, on images made by hand."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from benchmarks.data import recipe as recipe_lib

_OFF = {
  "padding": 0,
  "flip": 0.0,
  "magnitude": None,
  "erasing": 0.0,
  "mixup": 0.0,
  "cutmix": 0.0,
  "label_smoothing": 0.0,
}
SIZE = 24
_FILL = {1: 115, 3: (124, 116, 104)}  # 255 times the mean, rounded.


def only(image_size, num_channels=3, num_classes=10, **settings):
  """A recipe with nothing but what is given."""
  return recipe_lib.Recipe(
    image_size, num_channels, num_classes, **(_OFF | settings)
  )


def noise(*shape):
  return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def rng(seed=0):
  return np.random.default_rng(seed)


def operate(name, image, level):
  """The result of an operation of RandAugment."""
  channels = image.shape[-1]
  pillow = Image.fromarray(image if channels == 3 else image[..., 0])
  result = recipe_lib._OPERATIONS[name](pillow, level, _FILL[channels])
  return np.asarray(result).reshape(image.shape)


channels = pytest.mark.parametrize("channels", [1, 3])


@channels
def test_flip(channels):
  image = noise(4, 4, channels)
  got = recipe_lib.augment(only(4, channels, flip=1.0), rng(), image)
  np.testing.assert_array_equal(got, image[:, ::-1])
  flipped = [
    np.array_equal(
      recipe_lib.augment(only(4, channels, flip=0.5), rng(i), image), got
    )
    for i in range(400)
  ]
  assert abs(np.mean(flipped) - 0.5) < 5 * math.sqrt(0.25 / 400)


@channels
def test_small_images_are_padded_and_cropped(channels):
  image = noise(4, 4, channels) | 1
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  windows = [
    padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)
  ]
  got = [
    recipe_lib.augment(only(4, channels, padding=1), rng(i), image).tobytes()
    for i in range(100)
  ]
  assert set(got) == set(windows)


def test_small_images_of_another_size_are_scaled():
  image = np.full((9, 5, 3), 77, np.uint8)
  got = recipe_lib.augment(only(4), rng(), image)
  np.testing.assert_array_equal(got, np.full((4, 4, 3), 77))


def test_boxes_of_random_resized_crops():
  draws = rng()
  shares = []
  for _ in range(2000):
    left, top, right, bottom = recipe_lib._crop_box(only(224), draws, 90, 60)
    assert 0 <= left < right <= 90
    assert 0 <= top < bottom <= 60
    width, height = right - left, bottom - top
    assert (width - 0.5) / (height + 0.5) <= 4 / 3
    assert (width + 0.5) / (height - 0.5) >= 3 / 4
    shares.append(width * height / 5400)
  assert 0.07 < min(shares) < 0.09
  # The greatest box that has an allowed ratio and fits.
  assert 0.8 < max(shares) <= 80 * 60 / 5400


@pytest.mark.parametrize(
  ("size", "box"), [((100, 1), (49, 0, 50, 1)), ((6, 90), (0, 41, 6, 49))]
)
def test_the_crop_of_an_image_too_long_is_its_middle(size, box):
  recipe = only(224, crop_scale=(1.0, 1.0))
  assert recipe_lib._crop_box(recipe, rng(), *size) == box


@channels
def test_a_random_resized_crop(channels):
  """Of an image whose values tell where they come from."""
  ramp = np.repeat(np.arange(200, dtype=np.uint8)[:, None], 200, axis=1)
  image = np.repeat(ramp[..., None], channels, axis=-1)
  got = recipe_lib.augment(only(40, channels), rng(1), image)
  _, top, _, bottom = recipe_lib._crop_box(only(40), rng(1), 200, 200)
  assert got.shape == (40, 40, channels)
  height = bottom - top
  places = top + (np.arange(40) + 0.5) * height / 40 - 0.5
  # But for the edges, where there are fewer neighbours.
  np.testing.assert_allclose(got[4:-4, 7, 0], places[4:-4], atol=1)
  assert np.all(got == got[:, :1, :1])


@pytest.mark.parametrize(
  ("name", "level", "values", "want"),
  [
    ("invert", 0.9, [0, 10, 255], [255, 245, 0]),
    ("posterize", 0.0, [0, 15, 16, 255], [0, 0, 16, 240]),
    ("posterize", 0.9, [0, 127, 128, 255], [0, 0, 128, 128]),
    ("posterize", -1.0, [0, 127, 128, 255], [0, 0, 0, 0]),
    ("solarize", 0.5, [0, 127, 128, 255], [0, 127, 127, 0]),
    ("solarize_add", 1.0, [0, 17, 127, 128], [110, 127, 237, 128]),
    ("brightness", -1.0, [0, 100, 200], [0, 10, 20]),
    ("brightness", 0.5, [0, 100, 200], [0, 145, 255]),
    ("contrast", -1.0, [0, 200], [90, 110]),
    ("contrast", 1.0, [90, 110], [81, 119]),
    ("auto_contrast", 0.9, [100, 110, 120], [0, 127, 255]),
    ("color", 0.9, [100, 110, 120], [100, 110, 120]),
    ("sharpness", 0.9, [100, 100, 100], [100, 100, 100]),
    ("equalize", 0.9, [100] * 255 + [110] * 255, [0] * 255 + [255] * 255),
  ],
)
@channels
def test_operations_on_values(name, level, values, want, channels):
  """In an image of one row, alike in all channels."""
  image = np.array(values, np.uint8)[None, :, None].repeat(channels, axis=-1)
  got = operate(name, image, level)
  np.testing.assert_array_equal(
    got[0], np.array(want)[:, None].repeat(channels, axis=1)
  )


def test_color():
  image = np.array([[[200, 0, 0]]], np.uint8)
  # Of the luminance, 0.299 * 200, nine tenths remain.
  np.testing.assert_array_equal(operate("color", image, -1.0), [[[74, 54, 54]]])


def test_sharpness():
  image = np.zeros((5, 5, 1), np.uint8)
  image[2, 2] = 130
  got = operate("sharpness", image, -1.0)[1:4, 1:4, 0]
  # A tenth of the image, and nine of it smoothed, by 5/13 and 1/13.
  np.testing.assert_array_equal(got, [[9] * 3, [9, 58, 9], [9] * 3])


@channels
def test_moves(channels):
  """By 0.45 of the size; what comes in is the mean colour."""
  image = noise(20, 40, channels)
  fill = np.full((20, 18, channels), _FILL[channels])
  got = operate("translate_x", image, 1.0)
  np.testing.assert_array_equal(got, np.concatenate([image[:, 18:], fill], 1))
  got = operate("translate_x", image, -1.0)
  np.testing.assert_array_equal(got, np.concatenate([fill, image[:, :-18]], 1))
  got = operate("translate_y", image, 1.0)
  np.testing.assert_array_equal(got[:11], image[9:])
  np.testing.assert_array_equal(
    got[11:], fill.swapaxes(0, 1).repeat(3, 1)[:9, :40]
  )


@channels
def test_shears_and_rotation(channels):
  image = noise(20, 20, channels)
  fill = np.array(_FILL[channels])
  got = operate("shear_x", image, 1.0)
  np.testing.assert_array_equal(
    got, operate("shear_y", image.swapaxes(0, 1), 1.0).swapaxes(0, 1)
  )
  # A row moves by 0.3 of its distance from the edge.
  inside = (np.arange(20) + 0.5)[None] + 0.3 * (np.arange(20) + 0.5)[
    :, None
  ] < 20
  np.testing.assert_array_equal(
    got[~inside], np.broadcast_to(fill, got[~inside].shape)
  )
  assert np.mean(got[inside] != fill) > 0.9
  got = operate(
    "rotate", np.pad(image[8:12, 8:12], ((8,) * 2, (8,) * 2, (0, 0))), 1.0
  )
  corners = got[[0, 0, -1, -1], [0, -1, 0, -1]]
  np.testing.assert_array_equal(corners, np.broadcast_to(fill, corners.shape))
  # Anticlockwise, where the level is positive: a bar to the right goes up.
  bar = np.zeros((21, 21, channels), np.uint8)
  bar[10, 10:] = 255
  rows, columns = np.nonzero(operate("rotate", bar, 1.0)[5:16, 5:16, 0] > 128)
  assert np.polyfit(columns, rows, 1)[0] == pytest.approx(
    -math.tan(math.radians(30)), abs=0.1
  )


def test_operations_of_no_strength():
  image = noise(12, 12, 3)
  for name in ("rotate", "color", "contrast", "brightness", "sharpness",
               "shear_x", "shear_y", "translate_x", "translate_y", "solarize",
               "solarize_add"):  # fmt: skip
    np.testing.assert_array_equal(operate(name, image, 0.0), image)


def test_the_law_of_rand_augment(monkeypatch):
  """Two of 15, each applied by chance, with a strength clipped to 10."""
  calls = []

  def recorded(name):
    return lambda image, level, fill: calls.append((name, level, fill)) or image

  monkeypatch.setattr(
    recipe_lib, "_OPERATIONS", {k: recorded(k) for k in recipe_lib._OPERATIONS}
  )
  recipe = only(4, magnitude=9.0)
  draws, n = rng(), 6000
  counts = collections.Counter()
  for _ in range(n):
    before = len(calls)
    recipe_lib.augment(recipe, draws, noise(4, 4, 3))
    counts[len(calls) - before] += 1
  for count, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
    assert abs(counts[count] / n - share) < 5 * math.sqrt(share / n)
  names = collections.Counter(name for name, _, _ in calls)
  assert len(names) == 15
  for count in names.values():
    assert abs(count - n / 15) < 5 * math.sqrt(n / 15)
  levels = np.array([level for _, level, _ in calls])
  assert abs(np.mean(levels > 0) - 0.5) < 5 * math.sqrt(0.25 / n)
  strengths = abs(levels)
  assert strengths.max() == 1
  at_most = 0.5 * math.erfc(2 / math.sqrt(2))  # Two standard deviations above.
  assert abs(np.mean(strengths == 1) - at_most) < 5 * math.sqrt(at_most / n)
  assert abs(np.median(strengths) - 0.9) < 5 * 0.05 * math.sqrt(math.pi / 2 / n)
  assert {fill for _, _, fill in calls} == {_FILL[3]}


@channels
def test_validation_above_32_pixels(channels):
  image = noise(73, 73, channels)  # 64 * 256 / 224, rounded down.
  got = recipe_lib.resize(only(64, channels), image)
  np.testing.assert_array_equal(got, image[4:68, 4:68])
  image = noise(73, 101, channels)
  got = recipe_lib.resize(only(64, channels), image)
  np.testing.assert_array_equal(got, image[4:68, 18:82])


@channels
def test_validation_up_to_32_pixels(channels):
  image = noise(32, 32, channels)
  np.testing.assert_array_equal(
    recipe_lib.resize(only(32, channels), image), image
  )
  got = recipe_lib.resize(
    only(16, channels), np.full((9, 30, channels), 50, np.uint8)
  )
  np.testing.assert_array_equal(got, np.full((16, 16, channels), 50))


@channels
def test_standardise(channels):
  recipe = only(8, channels)
  image = noise(2, 8, 8, channels)
  got = recipe_lib.standardise(recipe, jnp.asarray(image))
  assert got.dtype == jnp.float32
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  if channels == 1:
    mean, std = mean.mean(), std.mean()
  np.testing.assert_allclose(got, (image / 255 - mean) / std, atol=1e-6)


def differ(x, y):
  """Where images differ by more than rounding."""
  return abs(x - y) > 1e-5


def mix(recipe, seed, images, labels):
  mixed = jax.jit(recipe_lib.mix, static_argnums=0)(
    recipe, jax.random.key(seed), jnp.asarray(images), jnp.asarray(labels)
  )
  return jax.tree.map(np.asarray, mixed)


def test_erasing():
  recipe = only(SIZE, 3, erasing=1.0)
  images, labels = noise(200, SIZE, SIZE, 3), np.zeros(200, np.int32)
  before, _ = mix(only(SIZE, 3), 0, images, labels)
  after, targets = mix(recipe, 0, images, labels)
  shares, values = [], []
  for old, new in zip(before, after, strict=True):
    changed = np.any(differ(old, new), axis=-1)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    assert changed[box].all()
    assert changed.sum() == changed[box].size
    height, width = changed[box].shape
    assert (height + 0.5) / (width - 0.5) >= 0.3
    assert (height - 0.5) / (width + 0.5) <= 1 / 0.3
    shares.append(changed.mean())
    values.append(new[box].ravel())
  assert 0.01 < min(shares) < 0.05
  assert 0.28 < max(shares) < 0.36
  values = np.concatenate(values)
  assert abs(values.mean()) < 5 / math.sqrt(len(values))
  assert abs(values.std() - 1) < 5 / math.sqrt(2 * len(values))
  np.testing.assert_array_equal(targets, np.eye(10)[labels])


def test_how_often_images_are_erased():
  recipe = only(4, erasing=0.25)
  erased = jax.jit(jax.vmap(lambda key: recipe_lib._erased(recipe, key)))(
    jax.random.split(jax.random.key(0), 4000)
  )
  share = np.mean(np.any(erased, axis=(1, 2, 3)))
  assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_mixup():
  images, labels = noise(6, SIZE, SIZE, 1), np.arange(6, dtype=np.int32)
  plain, _ = mix(only(SIZE, 1), 0, images, labels)
  lams = []
  for seed in range(8):
    mixed, targets = mix(only(SIZE, 1, mixup=0.8), seed, images, labels)
    lam = targets[0, 0]
    np.testing.assert_allclose(
      mixed, lam * plain + (1 - lam) * plain[::-1], atol=1e-6
    )
    hot = np.eye(10)[labels]
    np.testing.assert_allclose(
      targets, lam * hot + (1 - lam) * hot[::-1], atol=1e-6
    )
    lams.append(float(lam))
  assert len(set(lams)) == 8


def test_cutmix():
  """The share of a label is that of the pixels that are kept."""
  values = np.arange(6, dtype=np.uint8) * 40
  images = np.broadcast_to(values[:, None, None, None], (6, SIZE, SIZE, 3))
  labels = np.arange(6, dtype=np.int32)
  plain, _ = mix(only(SIZE, 3), 0, images, labels)
  kept = []
  for seed in range(8):
    mixed, targets = mix(only(SIZE, 3, cutmix=1.0), seed, images, labels)
    is_own = ~differ(mixed, plain)
    assert not np.any(~is_own & differ(mixed, plain[::-1]))
    assert np.all(is_own == is_own[:1, ..., :1])
    kept.append(is_own.mean())
    np.testing.assert_allclose(np.diag(targets), kept[-1], atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    rows, columns = (np.flatnonzero(~is_own[0, ..., 0].all(a)) for a in (1, 0))
    assert np.sum(~is_own[0, ..., 0]) == len(rows) * len(columns)
  assert len(set(kept)) > 4


@pytest.mark.parametrize("switch", [0.5, 0.0])
def test_mixup_or_cutmix(switch):
  """One or the other by chance, for the batch as a whole."""
  recipe = only(16, mixup=0.8, cutmix=1.0, switch=switch)
  by_pixel, _ = jax.jit(
    jax.vmap(lambda key: recipe_lib._share_kept(recipe, key))
  )(jax.random.split(jax.random.key(0), 2000))
  by_pixel = np.asarray(by_pixel)
  is_mixup = np.mean((by_pixel > 0) & (by_pixel < 1), axis=(1, 2, 3))
  assert set(is_mixup.tolist()) <= {0, 1}
  assert abs(is_mixup.mean() - (1 - switch)) <= 5 * math.sqrt(
    switch * (1 - switch) / 2000
  )


def test_label_smoothing():
  images, labels = noise(2, 4, 4, 1), np.array([0, 3], np.int32)
  _, targets = mix(only(4, 1, 5, label_smoothing=0.1), 0, images, labels)
  np.testing.assert_allclose(
    targets, 0.9 * np.eye(5)[labels] + 0.1 / 5, atol=1e-7
  )


@pytest.mark.parametrize(("size", "channels"), [(24, 1), (40, 3)])
@pytest.mark.slow
def test_all_of_it(size, channels):
  """Draws follow from the generator and the key alone."""
  recipe = recipe_lib.Recipe(size, channels, 7)
  examples = [noise(30 + i, 50, channels) for i in range(6)]
  labels = np.arange(6, dtype=np.int32)

  def batch(seed, key):
    images = [
      recipe_lib.augment(recipe, rng([seed, i]), x)
      for i, x in enumerate(examples)
    ]
    assert {(x.shape, x.dtype) for x in images} == {
      ((size, size, channels), np.dtype(np.uint8))
    }
    return mix(recipe, key, np.stack(images), labels)

  images, targets = batch(0, 0)
  assert images.dtype == targets.dtype == np.float32
  assert images.shape == (6, size, size, channels)
  assert targets.shape == (6, 7)
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  assert np.all(np.isfinite(images))
  for got, want in zip(batch(0, 0), (images, targets), strict=True):
    np.testing.assert_array_equal(got, want)
  assert np.any(batch(1, 0)[0] != images)
  assert np.any(batch(0, 1)[0] != images)
