"""The convolutional image encoder: a ResNet, its last grid as tokens and their mean as global."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from mlip_jax.models.layers import BatchNorm, dense, recomputed
from mlip_jax.models.vit import ImageViews

# Blocks of each stage, table 1 of arXiv 1512.03385.
_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
DEPTHS = tuple(_STAGES)
_EXPANSION = 4
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def reduction(stem: str) -> int:
    """How many pixels a cell of the last grid spans, along each side."""
    return {"imagenet": 32, "small": 8}[stem]


def feature_width(depth: int, width: int) -> int:
    """The width of the last features, for a first stage of `width` channels."""
    return width * 8 * (_EXPANSION if _is_bottleneck(depth) else 1)


def last_block(depth: int) -> str:
    """The name of the module whose output is the last grid."""
    stages = _STAGES[depth]
    return _block_name(len(stages) - 1, stages[-1] - 1)


def _block_name(stage: int, block: int) -> str:
    return f"stage_{stage}_block_{block}"


def _is_bottleneck(depth: int) -> bool:
    return depth >= 50


def _convolution(
    x: Float[Array, "batch rows columns channels"],
    channels: int,
    side: int,
    stride: int,
    name: str,
    dtype: jnp.dtype,
) -> Float[Array, "batch rows_out columns_out channels_out"]:
    """A convolution without bias, padded by side // 2 as PyTorch's; call it in a compact method."""
    if side == 1:
        # One product of matrices; a convolution costs more on CPUs.
        x = every(x, stride)
        return dense(x, channels, name, dtype, use_bias=False, kernel_init=KERNEL_INIT)
    return nn.Conv(
        channels,
        (side, side),
        stride,
        padding=side // 2,
        use_bias=False,
        kernel_init=KERNEL_INIT,
        dtype=dtype,
        name=name,
    )(x)


def every(
    x: Float[Array, "batch rows columns channels"], stride: int
) -> Float[Array, "batch rows_out columns_out channels"]:
    """x[:, ::stride, ::stride], without a strided slice.

    On one that a product follows, XLA's GPU compiler aborts the process (jaxlib 0.10).
    """
    if stride == 1:
        return x
    _, rows, columns, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % stride), (0, -columns % stride), (0, 0)))
    cells = rearrange(x, "b (r s1) (c s2) d -> b r s1 c s2 d", s1=stride, s2=stride)
    return cells[:, :, 0, :, 0]


class ResidualBlock(nn.Module):
    """Convolutions of the given `sides` and `channels`, a norm after each, and a shortcut.

    The first convolution larger than 1x1 has the stride. The shortcut is a 1x1 convolution with a
    norm where the block changes the shape.
    """

    sides: tuple[int, ...]
    channels: tuple[int, ...]
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns channels"], deterministic: bool
    ) -> Float[Array, "batch rows_out columns_out channels_out"]:
        y = x
        strided = next(index for index, side in enumerate(self.sides) if side > 1)
        for index, (side, channels) in enumerate(zip(self.sides, self.channels, strict=True)):
            if index:
                y = nn.relu(y)
            stride = self.stride if index == strided else 1
            y = _convolution(y, channels, side, stride, f"convolution_{index}", self.dtype)
            y = BatchNorm(self.dtype, name=f"norm_{index}")(y, deterministic)
        if x.shape != y.shape:
            x = _convolution(x, self.channels[-1], 1, self.stride, "shortcut", self.dtype)
            x = BatchNorm(self.dtype, name="shortcut_norm")(x, deterministic)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet (arXiv 1512.03385) as torchvision lays it out, which is called v1.5.

    A bottleneck strides in its 3x3 convolution. Stages have width, 2, 4 and 8 width channels,
    four times as many after bottlenecks. The stem "imagenet" reduces by 4 before the stages, a 7x7
    convolution and max pooling; "small", for small images, is a 3x3 convolution that keeps the
    resolution, as section 4.2 has it for CIFAR-10.
    """

    depth: int
    width: int
    stem: str
    dtype: jnp.dtype
    remat: bool = False  # blocks are computed again for their gradient

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width_px 3"],
        deterministic: bool = True,
        inspect: bool = False,
    ) -> ImageViews:
        """Encodes normalised images.

        Args:
          images: float, after mean and standard deviation; sides of any length.
          deterministic: norms take their running statistics and leave them alone. Otherwise they
            take the batch's, and the collection "batch_stats" has to be mutable.
          inspect: changes nothing; nothing merges here.

        Returns:
          The cells of the last grid, row by row, as spatial tokens and their mean as spatial
          global, both 8 (with bottlenecks 32) times `width` wide; no frequency views.
        """
        x = images.astype(self.dtype)
        side, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = _convolution(x, self.width, side, stride, "stem_convolution", self.dtype)
        x = nn.relu(BatchNorm(self.dtype, name="stem_norm")(x, deterministic))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(_STAGES[self.depth]):
            channels = self.width << stage
            bottleneck = _is_bottleneck(self.depth)
            sides = (1, 3, 1) if bottleneck else (3, 3)
            inner = (channels, channels)
            widths = (*inner, _EXPANSION * channels) if bottleneck else inner
            for block in range(blocks):
                x = recomputed(ResidualBlock, self.remat, deterministic=2)(
                    sides,
                    widths,
                    stride=2 if stage and not block else 1,
                    dtype=self.dtype,
                    name=_block_name(stage, block),
                )(x, deterministic)
        x = rearrange(x, "b r c d -> b (r c) d")
        return ImageViews(
            spatial_global=jnp.mean(x.astype(jnp.float32), axis=1).astype(self.dtype),
            spatial_tokens=x,
            sizes=jnp.ones(x.shape[:2], jnp.float32),
        )
