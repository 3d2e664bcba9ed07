# SPDX-License-Identifier: Apache-2.0
"""The models: numbers of parameters, shapes, what is dropped."""

import itertools

from flax import nnx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import models
from benchmarks.models import convnext, layers, MODELS, swin

CLASSES = 10

# Small ones: name, size and channels of images, changes.
SMALL = {
  "logreg": ("logreg", 28, 1, {}),
  "mlp4": ("mlp4", 16, 3, {}),
  "convnet": ("convnet", 16, 3, {}),
  "vit": ("vit", 14, 1, {}),
  "mixer": ("mixer", 14, 1, {}),
  "convnext-28": (
    "convnext-femto",
    *(28, 1, {"patch_size": 2, "depths": (1, 1), "widths": (4, 8)}),
  ),
  "convnext-32": (
    "convnext-femto",
    *(32, 3, {"depths": (1, 1, 1), "widths": (4, 8, 8)}),
  ),
  "vit-28": (
    "vit-tiny",
    *(28, 1, {"patch_size": 7, "width": 8, "depth": 2, "heads": 2}),
  ),
  "vit-16": (
    "vit-base",
    *(16, 3, {"patch_size": 8, "width": 12, "depth": 1, "heads": 3}),
  ),
  "swin-28": (
    "swin-femto",
    *(28, 3, {"patch_size": 2, "width": 4, "depths": (2, 1), "heads": (1, 2)}),
  ),
  "swin-16": (
    "swin-femto",
    *(
      *(16, 1),
      {"width": 4, "depths": (2, 1), "heads": (1, 2), "window": 2},
    ),
  ),
  "mixer-32": ("mixer-s32", 32, 3, {"patch_size": 8, "width": 8, "depth": 2}),
  "mixer-16": ("mixer-s16", 16, 1, {"patch_size": 4, "width": 8, "depth": 1}),
}
# One of each class that drops paths.
DROPPING = ["convnext-28", "vit-28", "swin-16", "mixer-32"]


def make(case, **options):
  """A model with weights away from initial ones that are nearly zero."""
  name, size, channels, changes = SMALL[case]
  graphdef, shapes = nnx.split(
    nnx.eval_shape(
      lambda: MODELS[name](
        size, channels, CLASSES, rngs=nnx.Rngs(0), **changes, **options
      )
    ),
    nnx.Param,
  )
  generator = np.random.default_rng(1)

  def weights(path, leaf):
    center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    values = generator.normal(center, 0.3, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return graphdef, jax.tree.map_with_path(weights, shapes)


def images_of(case, batch=3):
  _, size, channels, _ = SMALL[case]
  return jax.random.normal(jax.random.key(2), (batch, size, size, channels))


def apply(graphdef, params, images, key=None):
  rngs = None if key is None else nnx.Rngs(dropout=key)
  return nnx.merge(graphdef, params)(images, rngs=rngs)


jitted = jax.jit(apply, static_argnums=0)


def linear(num_inputs, num_outputs):
  return (num_inputs + 1) * num_outputs


def convnext_count(depths, widths):
  total = linear(4 * 4 * 3, widths[0]) + 2 * widths[0]
  for depth, c in zip(depths, widths, strict=True):
    # Kernel and bias, norm, perceptron, layer scale.
    total += depth * (
      49 * c + c + 2 * c + linear(c, 4 * c) + linear(4 * c, c) + c
    )
  for before, after in itertools.pairwise(widths):
    total += 2 * before + linear(4 * before, after)
  return total + 2 * widths[-1] + linear(widths[-1], 1000)


def transformer_block_count(c):
  attention = linear(c, 3 * c) + linear(c, c)
  return 4 * c + attention + linear(c, 4 * c) + linear(4 * c, c)


def vit_count(c, depth):
  patches = (224 // 16) ** 2
  ends = linear(16 * 16 * 3, c) + 2 * c + linear(c, 1000)
  return ends + c + (patches + 1) * c + depth * transformer_block_count(c)


def swin_count(c, depths, heads):
  total = linear(4 * 4 * 3, c) + 2 * c
  for i, (depth, n) in enumerate(zip(depths, heads, strict=True)):
    if i:
      # Merging has a norm and no bias.
      total += 2 * 4 * c + 4 * c * 2 * c
      c *= 2
    total += depth * (transformer_block_count(c) + 13**2 * n)
  return total + 2 * c + linear(c, 1000)


def mixer_count(patch):
  patches, c = (224 // patch) ** 2, 512
  tokens = linear(patches, 256) + linear(256, patches)
  channels = linear(c, 2048) + linear(2048, c)
  blocks = 8 * (4 * c + tokens + channels)
  return linear(patch**2 * 3, c) + blocks + 2 * c + linear(c, 1000)


# Those of the vision transformers and of ConvNeXt-Base are published, too.
COUNTS = {
  "logreg": linear(224 * 224 * 3, 1000),
  "convnext-femto": convnext_count((2, 2, 6, 2), (48, 96, 192, 384)),
  "convnext-base": convnext_count((3, 3, 27, 3), (128, 256, 512, 1024)),
  "vit-tiny": vit_count(192, 12),
  "vit-base": vit_count(768, 12),
  "swin-femto": swin_count(40, (2, 2, 6, 2), (2, 4, 8, 16)),
  "mixer-s32": mixer_count(32),
  "mixer-s16": mixer_count(16),
}
PUBLISHED = {
  "vit-tiny": 5_717_416,
  "vit-base": 86_567_656,
  "convnext-base": 88_591_464,
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name):
  model = nnx.eval_shape(lambda: MODELS[name](224, 3, 1000, rngs=nnx.Rngs(0)))
  _, params, rest = nnx.split(model, nnx.Param, ...)
  assert not jax.tree.leaves(rest)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == COUNTS[name] == PUBLISHED.get(name, count)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype(jnp.float32)
  }


def test_perceptrons_are_those_of_models():
  graphdef, params = make("mlp4")
  sizes = models.widths(4, 16 * 16 * 3, CLASSES)
  other = nnx.eval_shape(lambda: models.MLP(sizes, rngs=nnx.Rngs(0)))
  nnx.update(other, params["mlp"])
  images = images_of("mlp4")
  np.testing.assert_allclose(
    jitted(graphdef, params, images), other(images.reshape(3, -1)), rtol=1e-5
  )


@pytest.mark.parametrize("case", SMALL)
def test_logits(case):
  graphdef, params = make(case)
  images = images_of(case)
  logits = jitted(graphdef, params, images)
  assert logits.shape == (3, CLASSES)
  assert logits.dtype == jnp.float32
  assert np.all(np.isfinite(logits))
  # Examples do not mix.
  np.testing.assert_allclose(
    jitted(graphdef, params, images.at[1:].set(0))[0],
    logits[0],
    rtol=1e-5,
    atol=1e-6,
  )


# Flax's LayerNorm mixes dtypes.
@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", ["logreg", "convnext-28", "swin-16"])
def test_bfloat16(case):
  exact = jitted(*make(case), images_of(case))
  graphdef, params = make(case, dtype=jnp.bfloat16)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
  assert dtypes == {jnp.dtype(jnp.float32)}
  logits = jitted(graphdef, params, images_of(case))
  assert logits.dtype == jnp.float32
  error = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
  # It is of 8 bits; float32 would give less.
  assert 2.0**-12 < error < 2.0**-4


@pytest.mark.slow
def test_remat_gives_the_same_gradients():
  case = "convnext-28"

  def gradient(remat):
    graphdef, params = make(case, drop_path=0.5, remat=remat)

    def loss(params, images, key):
      return jnp.sum(apply(graphdef, params, images, key) ** 2)

    arguments = params, images_of(case), jax.random.key(3)
    traced = jax.jit(jax.grad(loss)).trace(*arguments)
    compiled = traced.lower().compile()
    return compiled(*arguments), str(traced.jaxpr).count("remat")

  plain, without = gradient(False)
  other, with_remat = gradient(True)
  assert without == 0
  assert with_remat > 0
  plain, other = (jax.flatten_util.ravel_pytree(g)[0] for g in (plain, other))
  # Of the whole gradient: some of it is zero but for rounding.
  scale = float(jnp.abs(plain).max())
  np.testing.assert_allclose(plain, other, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("case", DROPPING)
@pytest.mark.slow
def test_stochastic_depth_is_a_function_of_the_key(case):
  graphdef, params = make(case, drop_path=0.5)
  images = images_of(case, batch=16)
  first, again, other = (
    jitted(graphdef, params, images, jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)


def test_nothing_is_dropped_without_a_key_or_a_rate():
  images = images_of("vit-28")
  plain = jitted(*make("vit-28"), images)
  for rate, key in ((0.5, None), (0.0, jax.random.key(0))):
    other = jitted(*make("vit-28", drop_path=rate), images, key)
    np.testing.assert_array_equal(other, plain)


def test_drop():
  x = jnp.ones((20_000, 2, 3))
  y = layers.drop(x, 0.25, jax.random.key(0))
  # By example, all or nothing, scaled by the probability of being kept.
  kept = np.asarray(y[:, 0, 0]) != 0
  want = np.where(kept, np.float32(1) / np.float32(0.75), np.float32(0))
  np.testing.assert_array_equal(
    y, np.broadcast_to(want[:, None, None], x.shape)
  )
  # Five standard deviations of the share.
  assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / len(kept)) ** 0.5
  for rate, key in ((0.0, jax.random.key(0)), (0.5, None)):
    np.testing.assert_array_equal(layers.drop(x, rate, key), x)


def test_rates_rise_linearly_over_all_blocks():
  model = nnx.eval_shape(
    lambda: MODELS["convnext-femto"](
      *(8, 1, CLASSES),
      rngs=nnx.Rngs(0),
      drop_path=0.3,
      patch_size=1,
      depths=(2, 1, 1),
      widths=(4, 4, 4),
    )
  )
  rates = [[block.rate for block in blocks] for blocks in model.stages]
  for got, want in zip(rates, [[0, 0.1], [0.2], [0.3]], strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_branches_of_a_block_are_dropped_apart():
  graphdef, params = make("vit-28", drop_path=0.5)
  x = jax.random.normal(jax.random.key(0), (1, 17, 8))
  many = jnp.broadcast_to(x, (64, 17, 8))
  block = jax.jit(
    lambda params, x, key: nnx.merge(graphdef, params).blocks[1](x, key)
  )
  outputs = block(params, many, jax.random.key(2))
  # None, the one, the other or both of the two.
  assert len(np.unique(np.asarray(outputs[:, 0, 0]).round(4))) == 4


@pytest.mark.slow
def test_initial_weights():
  @nnx.jit
  def modules():
    rngs = nnx.Rngs(0)
    return (
      layers.Cut(7, 1, 32, rngs=rngs),
      layers.Attention(32, 2, rngs=rngs),
      convnext._ConvNeXtBlock(1, 0.0, rngs=rngs),
      MODELS["mixer-s32"](
        8, 1, CLASSES, rngs=rngs, patch_size=4, width=8, depth=1
      ),
    )

  embed, attention, block, mixer = modules()
  # PyTorch's of a convolution: of 49 inputs.
  for param in (embed.linear.kernel, embed.linear.bias):
    assert 0.5 / 7 < jnp.abs(param[...]).max() <= 1 / 7
  np.testing.assert_allclose(attention.inputs.kernel[...].std(), 0.02, rtol=0.1)
  np.testing.assert_array_equal(attention.inputs.bias[...], 0)
  np.testing.assert_array_equal(block.layer_scale[...], np.float32(1e-6))
  np.testing.assert_array_equal(mixer.head.kernel[...], 0)
  hidden = mixer.blocks[0].channels.first
  limit = (6 / (8 + 32)) ** 0.5
  assert 0.8 * limit < jnp.abs(hidden.kernel[...]).max() <= limit
  assert 0 < jnp.abs(hidden.bias[...]).max() < 1e-5


@pytest.mark.slow
def test_depthwise_by_matrix(monkeypatch):
  shape = (2, 5, 9, 3)
  x, target = (
    jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1)
  )
  kernel = jax.random.normal(jax.random.key(2), (7, 7, shape[-1]))
  results = []
  for max_pixels in (45, 44):
    monkeypatch.setattr(convnext, "_MATRIX_PIXELS", max_pixels)
    value, pull = jax.vjp(convnext.depthwise, x, kernel)
    results.append((value, *pull(target)))
  for a, b in zip(*results, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def swin_block(size, window, shifted):
  return swin._SwinBlock(4, 2, 0.0, size, window, shifted, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.slow
def test_attention_stays_in_its_window(shifted):
  size, window = 8, 4
  block = swin_block(size, window, shifted)
  x = jax.random.normal(jax.random.key(0), (1, size, size, 4))

  # Whether the sum of an output depends on an input, by position.
  def outputs(x):
    return block(x, None).sum(axis=(0, -1))

  jacobian = np.abs(jax.jit(jax.jacrev(outputs))(x)).sum(axis=(2, 5))
  depends = jacobian.reshape(size**2, size**2) > 0
  # Windows start at 0 and 4, or at 2 and 6 with what is cut off at the sides.
  part = (np.arange(size) + (window // 2 if shifted else 0)) // window
  region = (3 * part[:, None] + part).ravel()
  np.testing.assert_array_equal(depends, region[:, None] == region)


def test_the_bias_is_by_relative_position():
  window = 3
  relative = swin._relative(window)
  positions = list(np.ndindex(window, window))
  numbers = {}
  for (i, a), (j, b) in itertools.product(enumerate(positions), repeat=2):
    offset = (a[0] - b[0], a[1] - b[1])
    assert numbers.setdefault(offset, relative[i, j]) == relative[i, j]
  assert sorted(numbers.values()) == list(range((2 * window - 1) ** 2))


def test_a_window_as_large_as_the_map_is_not_shifted():
  block = swin_block(4, 7, shifted=True)
  assert (block.window, block.shift) == (4, 0)


def test_cut():
  image = np.arange(4 * 6 * 2).reshape(4, 6, 2)
  squares = layers.cut(image, 2)
  assert squares.shape == (2, 3, 2, 2, 2)
  np.testing.assert_array_equal(squares[1, 2], image[2:4, 4:6])


@pytest.mark.parametrize(
  ("name", "size", "changes", "message"),
  [
    ("vit-tiny", 28, {}, "image_size must be.*16, got 28"),
    ("mixer-s32", 28, {}, "image_size must be.*32, got 28"),
    ("convnext-femto", 28, {}, "halved 3 times.*got 28 with 7"),
    ("swin-femto", 32, {"window": 5}, "window must divide the 8 x 8.*got 5"),
  ],
)
def test_arguments_that_do_not_fit(name, size, changes, message):
  with pytest.raises(benchmarks.UserError, match=message):
    nnx.eval_shape(
      lambda: MODELS[name](size, 3, 10, rngs=nnx.Rngs(0), **changes)
    )


@pytest.mark.parametrize(
  ("num_layers", "num_inputs", "want"),
  [
    (1, 784, [784, 10]),
    (4, 3072, [3072, 733, 175, 41, 10]),  # The paper's, for CIFAR-10.
  ],
)
def test_widths(num_layers, num_inputs, want):
  assert models.widths(num_layers, num_inputs, 10) == want


def test_mlp():
  model = models.MLP([36, 20, 15, 10], rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).normal(size=(4, 36)).astype(np.float32)
  want = x
  for layer in model.layers:
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    want = want @ kernel + bias
    if layer is not model.layers[-1]:
      want = np.maximum(want, 0)
  np.testing.assert_allclose(model(x), want, rtol=1e-5, atol=1e-6)


def test_images_that_do_not_suit_a_model():
  with pytest.raises(
    benchmarks.UserError, match=r"^image_size must be a .*, 7, got 32"
  ):
    models.MODELS["vit"](32, 3, 10, rngs=nnx.Rngs(0))
