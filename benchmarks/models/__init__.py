# SPDX-License-Identifier: Apache-2.0
"""The models, by name."""

from collections.abc import Callable
from functools import partial

from flax import nnx

from benchmarks.models.convnet import ConvNet
from benchmarks.models.convnext import ConvNeXt
from benchmarks.models.mixer import Mixer
from benchmarks.models.mlp import MLP, NUM_LAYERS, Perceptron, widths
from benchmarks.models.swin import Swin
from benchmarks.models.vit import ViT

__all__ = ["MLP", "MODELS", "NUM_LAYERS", "widths"]

# Each makes a model from the size of square images, their number of channels,
# the number of classes and ``rngs``; further arguments are its settings. Models
# take images ``[batch, size, size, channels]``.
MODELS: dict[str, Callable[..., nnx.Module]] = {
  **{
    name: partial(Perceptron, num_layers=num_layers)
    for name, num_layers in NUM_LAYERS.items()
  },
  "convnet": ConvNet,
  "vit": partial(ViT, patch_size=7, width=32, depth=2, heads=4),
  "mixer": partial(Mixer, patch_size=7, width=32, depth=2),
  "convnext-femto": ConvNeXt,
  "convnext-base": partial(
    ConvNeXt, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)
  ),
  "vit-tiny": ViT,
  "vit-base": partial(ViT, width=768, heads=12),
  "swin-femto": Swin,
  "mixer-s32": Mixer,
  "mixer-s16": partial(Mixer, patch_size=16),
}
