# SPDX-License-Identifier: Apache-2.0
"""The architectures of the alpha-SVRG paper, at any size of images.

Functions, widths, epsilons, the places where paths are dropped and the
distributions of the initial weights are those of the authors' PyTorch code
(the directory ``models`` of github.com/davidyyd/alpha-SVRG), which takes them
from timm 0.6.12. Where that initialises by timm's ``trunc_normal_`` with
standard deviation 0.02, a plain normal distribution stands here: it is cut at
-2 and 2, a hundred standard deviations away.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import small as models

_normal = nnx.initializers.normal(0.02)
_zeros = nnx.initializers.zeros_init()

# Of Swin's norms, PyTorch's own; the other architectures have 1e-6.
_SWIN_EPSILON = 1e-5

# Of the map of features, in pixels: up to this size a matrix product is several
# times faster than XLA's convolution on the CPU.
_MATRIX_PIXELS = 256


class Perceptron(nnx.Module):
  """Logistic regression or a perceptron of :mod:`benchmarks.models`.

  Args:
    image_size: height and width of the images, in pixels.
    num_channels: of the images.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    num_layers: number of linear layers.
    drop_path: must be 0, as there are no paths to drop.
    dtype: of the computation; weights are of float32.
    remat: without effect, as there are no blocks.

  Raises:
    ValueError: if ``drop_path`` is not 0.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    num_layers: int,
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
  ):
    if drop_path:
      raise ValueError(
        f"drop_path must be 0 for a perceptron, got {drop_path}."
      )
    self.image_shape = (image_size, image_size, num_channels)
    sizes = models.widths(num_layers, image_size**2 * num_channels, num_classes)
    self.mlp = models.MLP(sizes, rngs=rngs, dtype=dtype)

  def __call__(
    self, images: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the logits, float32 ``[batch, num_classes]``."""
    _check_images(images, self.image_shape)
    logits = self.mlp(images.reshape(len(images), -1))
    return logits.astype(jnp.float32)


class _Network(nnx.Module):
  """What the other architectures share: features, then a linear head."""

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    num_features: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float,
    remat: bool,
    dtype: jax.typing.DTypeLike,
    head_init: nnx.Initializer = _normal,
  ):
    if not 0 <= drop_path < 1:
      raise ValueError(f"drop_path must be in [0, 1), got {drop_path}.")
    self.image_shape = (image_size, image_size, num_channels)
    self.drop_path = drop_path
    self.remat = remat
    self.dtype = dtype
    self.head = nnx.Linear(
      num_features,
      num_classes,
      kernel_init=head_init,
      dtype=jnp.float32,
      rngs=rngs,
    )

  def __call__(
    self, images: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the logits.

    Args:
      images: ``[batch, image_size, image_size, num_channels]``.
      rngs: gives, by its stream ``"dropout"``, the key of stochastic depth;
        without it nothing is dropped.

    Returns:
      float32 ``[batch, num_classes]``.

    Raises:
      ValueError: if the images are of another shape.
    """
    _check_images(images, self.image_shape)
    key = rngs.dropout() if rngs is not None and self.drop_path else None
    return self.head(self._features(images.astype(self.dtype), key))

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    raise NotImplementedError

  def _apply(
    self, blocks: nnx.List, x: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Applies blocks, each with keys of its own."""
    for i, block in enumerate(blocks):
      call = type(block).__call__
      if self.remat:
        call = nnx.remat(call)
      x = call(block, x, None if key is None else jax.random.fold_in(key, i))
    return x


class ConvNeXt(_Network):
  """ConvNeXt (Liu et al., 2022, "A ConvNet for the 2020s").

  As ``models/convnext.py`` of the authors: stages of blocks (a depthwise 7 x 7
  convolution, LayerNorm, a perceptron, layer scale from 1e-6), halved in size
  by LayerNorm and a 2 x 2 convolution between stages; the mean over pixels,
  LayerNorm and the head at the end.

  Args:
    image_size: height and width of the images, in pixels.
    num_channels: of the images.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    drop_path: rate of stochastic depth of the last block; it rises linearly
      from 0 in the first one.
    dtype: of the computation; weights and logits are of float32.
    remat: whether each block is computed anew for the backward pass.
    patch_size: of the stem, in pixels.
    depths: number of blocks of each stage.
    widths: number of features of each stage.

  Raises:
    ValueError: if an argument is out of range, or if the image cannot be cut
      into patches or halved as often as there are stages.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    patch_size: int = 4,
    depths: Sequence[int] = (2, 2, 6, 2),
    widths: Sequence[int] = (48, 96, 192, 384),
  ):
    if len(widths) != len(depths):
      raise ValueError(
        f"widths must be as many as depths, {len(depths)}, got {widths}."
      )
    size = _grid(image_size, patch_size)
    _check_halving(image_size, size, depths)
    super().__init__(
      image_size,
      num_channels,
      num_classes,
      widths[-1],
      rngs=rngs,
      drop_path=drop_path,
      dtype=dtype,
      remat=remat,
    )
    make_norm = functools.partial(_norm, dtype=dtype, rngs=rngs)
    make_cut = functools.partial(
      _Cut, dtype=dtype, rngs=rngs, kernel_init=_normal, bias_init=_zeros
    )
    self.stem = make_cut(patch_size, num_channels, widths[0])
    self.stem_norm = make_norm(widths[0])
    self.downsample_norms = nnx.List(
      [make_norm(width) for width in widths[:-1]]
    )
    self.downsamples = nnx.List(
      [make_cut(2, *pair) for pair in itertools.pairwise(widths)]
    )
    rates = _rates(drop_path, depths)
    self.stages = nnx.List(
      [
        nnx.List(
          [_ConvNeXtBlock(width, rate, dtype, rngs=rngs) for rate in stage]
        )
        for width, stage in zip(widths, rates, strict=True)
      ]
    )
    self.norm = make_norm(widths[-1])

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.stem_norm(self.stem(x))
    for i, blocks in enumerate(self.stages):
      if i:
        x = self.downsamples[i - 1](self.downsample_norms[i - 1](x))
      x = self._apply(blocks, x, _fold(key, i))
    return self.norm(x.mean(axis=(1, 2)))


class ViT(_Network):
  """Vision transformer (Dosovitskiy et al., 2021), tiny as in DeiT.

  As ``models/vision_transformer.py`` of the authors: a class token and learned
  positions, blocks with the norms first, biases of queries, keys and values,
  and a last norm.

  Args:
    image_size: height and width of the images, in pixels.
    num_channels: of the images.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    drop_path: rate of stochastic depth of the last block; it rises linearly
      from 0 in the first one.
    dtype: of the computation; weights and logits are of float32.
    remat: whether each block is computed anew for the backward pass.
    patch_size: height and width of a patch, in pixels.
    width: number of features of a patch.
    depth: number of blocks.
    heads: of the attention.

  Raises:
    ValueError: if an argument is out of range, if the image cannot be cut into
      patches, or the width not divided among the heads.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    patch_size: int = 16,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
  ):
    size = _grid(image_size, patch_size)
    super().__init__(
      image_size,
      num_channels,
      num_classes,
      width,
      rngs=rngs,
      drop_path=drop_path,
      dtype=dtype,
      remat=remat,
    )
    self.embed = _Cut(patch_size, num_channels, width, dtype, rngs=rngs)
    self.class_token = nnx.Param(_normal(rngs.params(), (1, width)))
    self.positions = nnx.Param(_normal(rngs.params(), (size**2 + 1, width)))
    [rates] = _rates(drop_path, [depth])
    self.blocks = nnx.List(
      [_AttentionBlock(width, heads, rate, dtype, rngs=rngs) for rate in rates]
    )
    self.norm = _norm(width, dtype, rngs=rngs)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    token = self.class_token[...].astype(x.dtype)
    token = jnp.broadcast_to(token, (len(x), *token.shape))
    x = jnp.concatenate([token, x], axis=1)
    x = x + self.positions[...].astype(x.dtype)[None]
    x = self._apply(self.blocks, x, key)
    # Of the class token only: LayerNorm is by token.
    return self.norm(x[:, 0])


class Swin(_Network):
  """Swin transformer (Liu et al., 2021): attention in shifted windows.

  As ``models/swin_transformer.py`` of the authors: windows in every second
  block are shifted by half a window, with a bias by relative position and a
  mask where the shift has joined what does not touch; 2 x 2 patches are merged
  between stages, with twice the features. A window is at most as large as the
  stage's map, and then is not shifted.

  Args:
    image_size: height and width of the images, in pixels.
    num_channels: of the images.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    drop_path: rate of stochastic depth of the last block; it rises linearly
      from 0 in the first one.
    dtype: of the computation; weights and logits are of float32.
    remat: whether each block is computed anew for the backward pass.
    patch_size: height and width of a patch, in pixels.
    width: number of features of a patch in the first stage.
    depths: number of blocks of each stage.
    heads: number of heads of each stage.
    window: height and width of a window, in patches.

  Raises:
    ValueError: if an argument is out of range, if the image cannot be cut into
      patches and windows or halved as often as there are stages, or the width
      not divided among the heads.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    patch_size: int = 4,
    width: int = 40,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (2, 4, 8, 16),
    window: int = 7,
  ):
    if len(heads) != len(depths):
      raise ValueError(
        f"heads must be as many as depths, {len(depths)}, got {heads}."
      )
    if window < 1:
      raise ValueError(f"window must be positive, got {window}.")
    size = _grid(image_size, patch_size)
    _check_halving(image_size, size, depths)
    widths = [width * 2**i for i in range(len(depths))]
    super().__init__(
      image_size,
      num_channels,
      num_classes,
      widths[-1],
      rngs=rngs,
      drop_path=drop_path,
      dtype=dtype,
      remat=remat,
    )
    make_norm = functools.partial(
      _norm, dtype=dtype, rngs=rngs, epsilon=_SWIN_EPSILON
    )
    self.embed = _Cut(patch_size, num_channels, width, dtype, rngs=rngs)
    self.embed_norm = make_norm(width)
    self.stages = nnx.List(
      [
        nnx.List(
          [
            _SwinBlock(
              widths[i],
              heads[i],
              rate,
              dtype,
              size=size // 2**i,
              window=window,
              shifted=bool(j % 2),
              rngs=rngs,
            )
            for j, rate in enumerate(stage)
          ]
        )
        for i, stage in enumerate(_rates(drop_path, depths))
      ]
    )
    self.merge_norms = nnx.List([make_norm(4 * w) for w in widths[:-1]])
    self.merges = nnx.List(
      [
        _linear(4 * w, 2 * w, dtype, rngs=rngs, use_bias=False)
        for w in widths[:-1]
      ]
    )
    self.norm = make_norm(widths[-1])

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed_norm(self.embed(x))
    for i, blocks in enumerate(self.stages):
      if i:
        # The authors' order of the four: by column first.
        x = models.cut(x, 2).swapaxes(-3, -2)
        x = x.reshape(*x.shape[:3], -1)
        x = self.merges[i - 1](self.merge_norms[i - 1](x))
      x = self._apply(blocks, x, _fold(key, i))
    return self.norm(x).mean(axis=(1, 2))


class Mixer(_Network):
  """MLP-Mixer (Tolstikhin et al., 2021).

  As ``models/mlp_mixer.py`` of the authors, with timm's initial weights: the
  head is zero. The perceptron of tokens has half as many hidden units as there
  are features, that of channels four times as many.

  Args:
    image_size: height and width of the images, in pixels.
    num_channels: of the images.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    drop_path: rate of stochastic depth of the last block; it rises linearly
      from 0 in the first one.
    dtype: of the computation; weights and logits are of float32.
    remat: whether each block is computed anew for the backward pass.
    patch_size: height and width of a patch, in pixels.
    width: number of features of a patch.
    depth: number of blocks.

  Raises:
    ValueError: if an argument is out of range, or if the image cannot be cut
      into patches.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    patch_size: int = 32,
    width: int = 512,
    depth: int = 8,
  ):
    size = _grid(image_size, patch_size)
    super().__init__(
      image_size,
      num_channels,
      num_classes,
      width,
      rngs=rngs,
      drop_path=drop_path,
      dtype=dtype,
      remat=remat,
      head_init=_zeros,
    )
    self.embed = _Cut(
      patch_size,
      num_channels,
      width,
      dtype,
      rngs=rngs,
      kernel_init=nnx.initializers.lecun_normal(),
      bias_init=_zeros,
    )
    [rates] = _rates(drop_path, [depth])
    self.blocks = nnx.List(
      [_MixerBlock(size**2, width, rate, dtype, rngs=rngs) for rate in rates]
    )
    self.norm = _norm(width, dtype, rngs=rngs)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    return self.norm(self._apply(self.blocks, x, key)).mean(axis=1)


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves each channel with a kernel of its own.

  On the CPU, small maps of features are multiplied with the matrix of the
  convolution, several times faster there than XLA's convolution and its
  gradients.

  Args:
    x: ``[batch, height, width, channels]``; zero outside.
    kernel: ``[size, size, channels]`` with an odd size, of the same dtype.

  Returns:
    An array like ``x``.
  """
  _, height, width, _ = x.shape
  if jax.default_backend() == "cpu" and height * width <= _MATRIX_PIXELS:
    return _depthwise_by_matrix(x, kernel)
  return _depthwise_by_convolution(x, kernel)


def _depthwise_by_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def _depthwise_by_matrix(x: jax.Array, kernel: jax.Array) -> jax.Array:
  _, height, width, _ = x.shape

  def taps(length: int) -> jax.Array:
    """1 where a tap of the kernel takes an input to an output."""
    size = len(kernel)
    tap, source, target = np.ogrid[:size, :length, :length]
    return jnp.asarray(source - target + size // 2 == tap, kernel.dtype)

  # Rows y and columns x of the input; v and u of the output.
  matrix = jnp.einsum("ijc,jxu->icxu", kernel, taps(width))
  matrix = jnp.einsum("icxu,iyv->cyxvu", matrix, taps(height))
  return jnp.einsum("byxc,cyxvu->bvuc", x, matrix)


class _Cut(nnx.Module):
  """A convolution whose stride is its kernel's size: a matrix product."""

  def __init__(
    self,
    size: int,
    num_inputs: int,
    num_outputs: int,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer | None = None,
  ):
    self.size = size
    fan_in = size**2 * num_inputs
    # PyTorch's own initial weights of a convolution, which the authors keep
    # for ViT and Swin: uniform up to 1 / sqrt(fan_in), the bias, too.
    limit = fan_in**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(
      key, shape, dtype, -limit, limit
    )
    self.linear = _linear(
      fan_in,
      num_outputs,
      dtype,
      rngs=rngs,
      kernel_init=kernel_init or uniform,
      bias_init=bias_init or uniform,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = models.cut(x, self.size)
    return self.linear(x.reshape(*x.shape[:-3], -1))


class _FeedForward(nnx.Module):
  def __init__(
    self,
    num_features: int,
    num_hidden: int,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    **inits: nnx.Initializer,
  ):
    self.first = _linear(num_features, num_hidden, dtype, rngs=rngs, **inits)
    self.second = _linear(num_hidden, num_features, dtype, rngs=rngs, **inits)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.second(nnx.gelu(self.first(x), approximate=False))


class _Attention(nnx.Module):
  def __init__(self, width: int, heads: int, dtype: Any, *, rngs: nnx.Rngs):
    if heads < 1 or width % heads:
      raise ValueError(
        f"heads must divide the width of {width} features, got {heads}."
      )
    self.heads = heads
    self.inputs = _linear(width, 3 * width, dtype, rngs=rngs)
    self.outputs = _linear(width, width, dtype, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attention among tokens, ``[batch, tokens, width]``."""
    split = self.inputs(x).reshape(*x.shape[:-1], 3, self.heads, -1)
    query, key, value = jnp.moveaxis(split, -3, 0)
    mixed = nnx.dot_product_attention(query, key, value, bias=bias, mask=mask)
    return self.outputs(mixed.reshape(x.shape))


class _ConvNeXtBlock(nnx.Module):
  def __init__(self, width: int, rate: float, dtype: Any, *, rngs: nnx.Rngs):
    self.rate = rate
    self.kernel = nnx.Param(_normal(rngs.params(), (7, 7, width)))
    self.bias = nnx.Param(jnp.zeros(width))
    self.norm = _norm(width, dtype, rngs=rngs)
    self.mlp = _FeedForward(width, 4 * width, dtype, rngs=rngs)
    self.layer_scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32))

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    kernel, bias, scale = (
      param[...].astype(x.dtype)
      for param in (self.kernel, self.bias, self.layer_scale)
    )
    y = depthwise(x, kernel) + bias[None, None, None]
    y = self.mlp(self.norm(y)) * scale[None, None, None]
    return x + _drop(y, self.rate, key)


class _AttentionBlock(nnx.Module):
  def __init__(
    self,
    width: int,
    heads: int,
    rate: float,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    epsilon: float = 1e-6,
  ):
    self.rate = rate
    self.norms = nnx.List(
      [_norm(width, dtype, rngs=rngs, epsilon=epsilon) for _ in range(2)]
    )
    self.attention = _Attention(width, heads, dtype, rngs=rngs)
    self.mlp = _FeedForward(width, 4 * width, dtype, rngs=rngs)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = x + _drop(self._attend(self.norms[0](x)), self.rate, _fold(key, 0))
    return x + _drop(self.mlp(self.norms[1](x)), self.rate, _fold(key, 1))

  def _attend(self, x: jax.Array) -> jax.Array:
    return self.attention(x)


class _SwinBlock(_AttentionBlock):
  def __init__(
    self,
    width: int,
    heads: int,
    rate: float,
    dtype: Any,
    *,
    size: int,
    window: int,
    shifted: bool,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      width, heads, rate, dtype, rngs=rngs, epsilon=_SWIN_EPSILON
    )
    self.window = min(window, size)
    if size % self.window:
      raise ValueError(
        f"window must divide the {size} x {size} patches of a stage, got"
        f" {window}."
      )
    self.shift = window // 2 if shifted and size > window else 0
    self.bias = nnx.Param(
      _normal(rngs.params(), ((2 * self.window - 1) ** 2, heads))
    )

  def _attend(self, x: jax.Array) -> jax.Array:
    size = x.shape[1]
    x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
    x = models.cut(x, self.window)
    # All windows of all examples are a batch, with the same masks by example.
    tokens = x.reshape(-1, self.window**2, x.shape[-1])
    bias = self.bias[...].astype(x.dtype)[_relative(self.window)]
    bias = jnp.moveaxis(bias, -1, 0)[None]
    mask = None
    if self.shift:
      mask = _shift_mask(size, self.window, self.shift)[:, None]
      mask = jnp.tile(mask, (len(x), 1, 1, 1))
    x = self.attention(tokens, bias, mask).reshape(x.shape)
    x = x.swapaxes(2, 3).reshape(len(x), size, size, -1)
    return jnp.roll(x, (self.shift, self.shift), axis=(1, 2))


class _MixerBlock(nnx.Module):
  def __init__(
    self,
    num_patches: int,
    width: int,
    rate: float,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
  ):
    self.rate = rate
    self.norms = nnx.List([_norm(width, dtype, rngs=rngs) for _ in range(2)])
    make_mlp = functools.partial(
      _FeedForward,
      dtype=dtype,
      rngs=rngs,
      kernel_init=nnx.initializers.xavier_uniform(),
      bias_init=nnx.initializers.normal(1e-6),
    )
    self.tokens = make_mlp(num_patches, width // 2)
    self.channels = make_mlp(width, 4 * width)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    mixed = self.tokens(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
    x = x + _drop(mixed, self.rate, _fold(key, 0))
    return x + _drop(self.channels(self.norms[1](x)), self.rate, _fold(key, 1))


def _norm(
  num_features: int, dtype: Any, *, rngs: nnx.Rngs, epsilon: float = 1e-6
) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    num_features,
    epsilon=epsilon,
    dtype=dtype,
    use_fast_variance=False,
    rngs=rngs,
  )


def _linear(
  num_inputs: int,
  num_outputs: int,
  dtype: Any,
  *,
  rngs: nnx.Rngs,
  kernel_init: nnx.Initializer = _normal,
  **options: Any,
) -> nnx.Linear:
  return nnx.Linear(
    num_inputs,
    num_outputs,
    dtype=dtype,
    kernel_init=kernel_init,
    rngs=rngs,
    **options,
  )


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Drops the path of some examples, and scales up that of the others."""
  if key is None or not rate:
    return x
  shape = (len(x), *[1] * (x.ndim - 1))
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0)


def _fold(key: jax.Array | None, number: int) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, number)


def _rates(drop_path: float, depths: Sequence[int]) -> list[list[float]]:
  """The rate of each block of each stage."""
  if not depths or min(depths) < 1:
    raise ValueError(f"depths must be positive, got {depths}.")
  rates = np.linspace(0, drop_path, sum(depths))
  ends = np.cumsum(depths)[:-1]
  return [stage.tolist() for stage in np.split(rates, ends)]


def _relative(window: int) -> np.ndarray:
  """Numbers of the relative positions of two tokens of a window."""
  rows, columns = np.divmod(np.arange(window**2), window)
  rows = rows[:, None] - rows + window - 1
  columns = columns[:, None] - columns + window - 1
  return rows * (2 * window - 1) + columns


def _shift_mask(size: int, window: int, shift: int) -> np.ndarray:
  """Which tokens of each window touched before the shift."""
  part = np.searchsorted(
    [size - window, size - shift], np.arange(size), "right"
  )
  region = models.cut((3 * part[:, None] + part)[..., None], window)
  region = region.reshape(-1, window**2)
  return region[:, :, None] == region[:, None]


def _grid(image_size: int, patch_size: int) -> int:
  """Number of patches along a side."""
  if patch_size < 1 or image_size < 1 or image_size % patch_size:
    raise ValueError(
      f"image_size must be a positive multiple of patch_size, {patch_size}, got"
      f" {image_size}."
    )
  return image_size // patch_size


def _check_halving(image_size: int, size: int, depths: Sequence[int]) -> None:
  if size % 2 ** (len(depths) - 1):
    raise ValueError(
      f"image_size must give patches that can be halved {len(depths) - 1} times"
      f" along each side, got {image_size} with {size} patches."
    )


def _check_images(images: jax.Array, shape: tuple[int, int, int]) -> None:
  if images.ndim != 4 or images.shape[1:] != shape:
    raise ValueError(f"images must be [batch, *{shape}], got {images.shape}.")


# Each makes a model from the size and number of channels of images, the number
# of classes and rngs.
ARCHITECTURES: dict[str, Callable[..., nnx.Module]] = {
  **{
    name: functools.partial(Perceptron, num_layers=num_layers)
    for name, num_layers in models.NUM_LAYERS.items()
  },
  "convnext-femto": ConvNeXt,
  "convnext-base": functools.partial(
    ConvNeXt, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)
  ),
  "vit-tiny": ViT,
  "vit-base": functools.partial(ViT, width=768, heads=12),
  "swin-femto": Swin,
  "mixer-s32": Mixer,
  "mixer-s16": functools.partial(Mixer, patch_size=16),
}
