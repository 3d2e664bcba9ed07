# SPDX-License-Identifier: Apache-2.0
"""The augmentation of images in the alpha-SVRG paper.

The paper trains with what timm 0.6.12 does by the settings of ConvNeXt. No
library for JAX or Grain draws by the same law (dm-pix, augmax, Keras), so
:func:`augment` is a thin layer over the operations of Pillow, which timm calls
too, and :func:`mix` is plain JAX.

What an image is put through, in this order: a random resized crop, or at 32
pixels and below a random crop of the padded image; a flip; RandAugment
``rand-m9-mstd0.5-inc1``; random erasing by noise; mixup or cutmix with the
batch in reverse order; smoothing of the labels. The authors also set colour
jitter, which has no effect: timm leaves it out where RandAugment is on.

The authors mix within the part of the batch of one GPU, with a draw for each;
here a batch is mixed as a whole, so that the number of devices does not matter.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageEnhance, ImageOps

# Up to this size, in pixels, an image is neither scaled nor cropped at random.
_SMALL = 32
_VALIDATION_CROP = 224 / 256
_BICUBIC = Image.Resampling.BICUBIC

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

# Of RandAugment.
_NUM_LAYERS = 2
_APPLIED = 0.5  # Probability.
_MAGNITUDE_STD = 0.5
_MAX_MAGNITUDE = 10.0

# Of random erasing.
_ERASED_AREA = (0.02, 1 / 3)  # Share of the image.
_ERASED_RATIO = (0.3, 1 / 0.3)  # Height to width.

_CROP_RATIO = (3 / 4, 4 / 3)  # Width to height.
_ATTEMPTS = 10  # At a box that lies within the image.


class Recipe(NamedTuple):
  """The settings, by default those of the paper (its code, ``main.py``)."""

  image_size: int  # Height and width of the images that come out, in pixels.
  num_channels: int  # 3, or 1 for shades of grey.
  num_classes: int
  # Least and greatest share of the area in a random resized crop.
  crop_scale: tuple[float, float] = (0.08, 1.0)
  padding: int = 4  # Black pixels on each side before the crop of small images.
  flip: float = 0.5  # Probability of a flip from left to right.
  # Mean strength of RandAugment, which is drawn for each operation and clipped
  # to 0 to 10; `None` turns it off.
  magnitude: float | None = 9.0
  erasing: float = 0.25  # Probability that noise replaces a box of an image.
  mixup: float = 0.8  # Parameter of the beta distribution; 0 turns it off.
  cutmix: float = 1.0  # The same for cutmix.
  switch: float = 0.5  # Probability of cutmix where both are on.
  label_smoothing: float = 0.1  # Share of a target spread over all classes.


def _by_channel(recipe: Recipe, rgb: tuple[float, ...]) -> tuple[float, ...]:
  """The values of the channels; for grey their mean."""
  return rgb if recipe.num_channels == 3 else (sum(rgb) / 3,)


def _to_pillow(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def _to_numpy(image: Image.Image) -> np.ndarray:
  return np.asarray(image).reshape(image.height, image.width, -1)


def _crop_box(
  recipe: Recipe, rng: np.random.Generator, width: int, height: int
) -> tuple[int, int, int, int]:
  """The left, upper, right and lower edge of a random resized crop."""
  log_ratio = [math.log(ratio) for ratio in _CROP_RATIO]
  for _ in range(_ATTEMPTS):
    area = rng.uniform(*recipe.crop_scale) * width * height
    ratio = math.exp(rng.uniform(*log_ratio))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if w <= width and h <= height:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      return int(left), int(top), int(left) + w, int(top) + h
  # The greatest box in the middle whose ratio is allowed.
  least, greatest = _CROP_RATIO
  w = min(width, round(height * greatest))
  h = min(height, round(width / least))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def _crop(
  recipe: Recipe, rng: np.random.Generator, image: Image.Image
) -> Image.Image:
  size = recipe.image_size
  if size > _SMALL:
    # Cropped first: pixels outside the box must not blur into it.
    return image.crop(_crop_box(recipe, rng, *image.size)).resize(
      (size, size), _BICUBIC
    )
  image = ImageOps.expand(image.resize((size, size), _BICUBIC), recipe.padding)
  left, top = rng.integers(2 * recipe.padding + 1, size=2).tolist()
  return image.crop((left, top, left + size, top + size))


def _enhance(enhancer: Callable) -> Callable:
  """An operation that leaves the image as it is at level 0."""
  return lambda image, level, fill: enhancer(image).enhance(
    max(0.1, 1 + 0.9 * level)
  )


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable:
  """An operation by its matrix, of the level and of width and height."""
  return lambda image, level, fill: image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix(level, *image.size),
    _BICUBIC,
    fillcolor=fill,
  )


# The operations of RandAugment. The level is the strength as a share of the
# greatest; its sign is random, and matters where there are two directions.
_OPERATIONS: dict[
  str, Callable[[Image.Image, float, tuple[int, ...]], Image.Image]
] = {
  "auto_contrast": lambda image, level, fill: ImageOps.autocontrast(image),
  "equalize": lambda image, level, fill: ImageOps.equalize(image),
  "invert": lambda image, level, fill: ImageOps.invert(image),
  "rotate": lambda image, level, fill: image.rotate(
    30 * level, _BICUBIC, fillcolor=fill
  ),
  # At the greatest level no bit is left, which ImageOps.posterize refuses.
  "posterize": lambda image, level, fill: image.point(
    lambda v: v - v % 2 ** (4 + int(abs(level) * 4))
  ),
  "solarize": lambda image, level, fill: ImageOps.solarize(
    image, 256 - int(abs(level) * 256)
  ),
  "solarize_add": lambda image, level, fill: image.point(
    lambda v: min(255, v + int(abs(level) * 110)) if v < 128 else v
  ),
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": _affine(lambda level, w, h: (1, 0.3 * level, 0, 0, 1, 0)),
  "shear_y": _affine(lambda level, w, h: (1, 0, 0, 0.3 * level, 1, 0)),
  "translate_x": _affine(lambda level, w, h: (1, 0, 0.45 * level * w, 0, 1, 0)),
  "translate_y": _affine(lambda level, w, h: (1, 0, 0, 0, 1, 0.45 * level * h)),
}


def _rand_augment(
  recipe: Recipe, rng: np.random.Generator, image: Image.Image
) -> Image.Image:
  fill = tuple(round(255 * x) for x in _by_channel(recipe, _IMAGENET_MEAN))
  operations = list(_OPERATIONS.values())
  for i in rng.integers(len(operations), size=_NUM_LAYERS).tolist():
    if rng.random() < _APPLIED:
      magnitude = rng.normal(recipe.magnitude, _MAGNITUDE_STD)
      level = min(max(magnitude, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
      sign = 1 if rng.random() < 0.5 else -1
      image = operations[i](image, sign * level, fill)
  return image


def augment(
  recipe: Recipe, rng: np.random.Generator, image: np.ndarray
) -> np.ndarray:
  """Augments an image for training, on the host."""
  result = _crop(recipe, rng, _to_pillow(image))
  if rng.random() < recipe.flip:
    result = ImageOps.mirror(result)
  if recipe.magnitude is not None:
    result = _rand_augment(recipe, rng, result)
  return _to_numpy(result)


def resize(recipe: Recipe, image: np.ndarray) -> np.ndarray:
  """Brings an image to its size for validation.

  Above 32 pixels the shorter side is scaled to 256/224 of the size, and the
  middle cut out; else the image is scaled as a whole.
  """
  result, size = _to_pillow(image), recipe.image_size
  if size <= _SMALL:
    return _to_numpy(result.resize((size, size), _BICUBIC))
  short, target = min(result.size), int(size / _VALIDATION_CROP)
  width, height = (int(target * side / short) for side in result.size)
  left, top = round((width - size) / 2), round((height - size) / 2)
  result = result.resize((width, height), _BICUBIC)
  return _to_numpy(result.crop((left, top, left + size, top + size)))


def standardise(recipe: Recipe, images: jax.Array) -> jax.Array:
  """Standardises images by the mean and standard deviation of ImageNet."""
  mean, std = (
    jnp.array(_by_channel(recipe, x), jnp.float32).reshape(1, 1, 1, -1)
    for x in (_IMAGENET_MEAN, _IMAGENET_STD)
  )
  return (images.astype(jnp.float32) / 255 - mean) / std


def _is_in_box(size: int, low: jax.Array, high: jax.Array) -> jax.Array:
  """Which pixels lie between corners: booleans of the shape (size, size, 1)."""
  places = jnp.arange(size, dtype=jnp.int32)[:, None]
  is_between = (low[None] <= places) & (places < high[None])
  return is_between[:, None, :1] & is_between[None, :, 1:]


def _erased(recipe: Recipe, key: jax.Array) -> jax.Array:
  """Which pixels of an image are erased."""
  size = recipe.image_size
  whether_key, box_key, corner_key = jax.random.split(key, 3)
  log_ratio = [math.log(ratio) for ratio in _ERASED_RATIO]
  low, high = jnp.array([_ERASED_AREA, log_ratio], jnp.float32).T
  areas, log_ratios = jax.random.uniform(
    box_key, (_ATTEMPTS, 2), jnp.float32, low, high
  ).T
  # The height and width of each attempt.
  ratios = jnp.exp(jnp.stack([log_ratios, -log_ratios]))
  sides = jnp.round(size * jnp.sqrt(areas[None] * ratios)).astype(jnp.int32)
  is_inside = jnp.all(sides < size, axis=0)
  side = sides[:, jnp.argmax(is_inside)]
  corner = jax.random.randint(corner_key, (2,), 0, size + 1 - side, jnp.int32)
  is_erased = jax.random.bernoulli(whether_key, recipe.erasing)
  return (
    is_erased & jnp.any(is_inside) & _is_in_box(size, corner, corner + side)
  )


def _erase(recipe: Recipe, key: jax.Array, images: jax.Array) -> jax.Array:
  box_key, noise_key = jax.random.split(key)
  keys = jax.random.split(box_key, len(images))
  erased = jax.vmap(lambda key: _erased(recipe, key))(keys)
  noise = jax.random.normal(noise_key, images.shape, images.dtype)
  return jnp.where(erased, noise, images)


def _share_kept(recipe: Recipe, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Share of each image that stays where it is mixed with another."""
  size = recipe.image_size
  switch_key, share_key, center_key = jax.random.split(key, 3)
  switch = (
    recipe.switch if recipe.mixup and recipe.cutmix else recipe.cutmix > 0
  )
  is_cutmix = jax.random.bernoulli(switch_key, float(switch))
  alpha = jnp.where(
    is_cutmix, jnp.float32(recipe.cutmix), jnp.float32(recipe.mixup)
  )
  share = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
  half = (size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
  center = jax.random.randint(center_key, (2,), 0, size, jnp.int32)
  low = jnp.maximum(center - half, 0)
  high = jnp.minimum(center + half, size)
  outside = 1 - jnp.prod(high - low).astype(jnp.float32) / size**2
  is_kept = ~_is_in_box(size, low, high)
  return (
    jnp.where(is_cutmix, is_kept.astype(jnp.float32), share),
    jnp.where(is_cutmix, outside, share),
  )


def mix(
  recipe: Recipe, key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Standardises, erases, mixes and smooths a batch, on the device.

  To be compiled by the caller. Each image is mixed with that at its place in
  the batch in reverse order, as timm does, by one draw for the batch.
  """
  erasing_key, mixing_key = jax.random.split(key)
  mixed = standardise(recipe, images)
  targets = optax.smooth_labels(
    jax.nn.one_hot(labels, recipe.num_classes, dtype=jnp.float32),
    recipe.label_smoothing,
  )
  if recipe.erasing:
    mixed = _erase(recipe, erasing_key, mixed)
  if recipe.mixup or recipe.cutmix:
    by_pixel, share = _share_kept(recipe, mixing_key)
    mixed = by_pixel[None] * mixed + (1 - by_pixel[None]) * mixed[::-1]
    targets = share * targets + (1 - share) * targets[::-1]
  return mixed, targets
