"""The layers that both towers share: attention, MLP, patch embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from mlip_jax.models.attention import attend
from mlip_jax.models.dropout import Dropout, DropPath

TOKEN_INIT = nn.initializers.normal(0.02)
KERNEL_INIT = nn.initializers.xavier_uniform()
EPSILON = 1e-5  # CLIP's, of its norms


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x): the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    """x * Phi(x), by the error function in float32.

    jax.nn.gelu goes by erfc, which costs about twice as much on CPUs.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def tanh_gelu(x: Array) -> Array:
    """GELU by its tanh approximation (arXiv 1606.08415), in float32: SigLIP's activation."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": tanh_gelu,
}


def layer_norm(name: str | None, dtype: jnp.dtype, epsilon: float = EPSILON) -> nn.LayerNorm:
    """LayerNorm with statistics in float32; in a module's setup it takes its name from there."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


@jax.custom_vjp
def half_product(
    x: Float[Array, "*batch width"], kernel: Float[Array, "width features"]
) -> Float[Array, "*batch features"]:
    """The product of bfloat16 rows with a kernel in bfloat16; the kernel's gradient is float32.

    It is a sum over the batch's rows, and over devices, which are summed in its type.
    XLA has native products for CPUs too, but only into float32, and for a kernel's gradient only
    where it sums over several axes; all others it computes in float32, after copies.
    """

    def product(x: Array, kernel: Array, sums: jnp.dtype) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        product = jnp.dot(rows, kernel, preferred_element_type=sums).astype(x.dtype)
        return product.reshape(*x.shape[:-1], kernel.shape[-1])

    kernel = kernel.astype(x.dtype)

    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(product, sums=jnp.dtype("float32")),
        default=functools.partial(product, sums=x.dtype),
    )


def _half_product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return half_product(x, kernel), (x, kernel)


def _half_product_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def over_axes(x: Array, gradient: Array) -> Array:
        axes = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, gradient, (axes, axes), preferred_element_type=jnp.float32)

    def over_rows(x: Array, gradient: Array) -> Array:
        x, gradient = (rows.reshape(-1, rows.shape[-1]) for rows in (x, gradient))
        return jnp.dot(x.T, gradient, preferred_element_type=jnp.float32)

    for_kernel = jax.lax.platform_dependent(x, gradient, cpu=over_axes, default=over_rows)
    return half_product(gradient, kernel.T), for_kernel.astype(kernel.dtype)


half_product.defvjp(_half_product_forward, _half_product_backward)


@jax.custom_vjp
def half_logits(
    x: Float[Array, "*batch width"], table: Float[Array, "vocabulary width"]
) -> Float[Array, "*batch vocabulary"]:
    """The products of bfloat16 rows with all rows of a table, in float32, as its gradient is.

    The table is taken in bfloat16. On GPUs the logits' gradient is rounded to that, or they would
    multiply in float32.
    """
    return jnp.einsum("...d,vd->...v", x, table.astype(x.dtype), preferred_element_type=jnp.float32)


def _half_logits_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def products(x: Array, table: Array, gradient: Array) -> tuple[Array, Array]:
        rows, of_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        for_x = jnp.dot(of_rows, table, preferred_element_type=jnp.float32)
        for_table = jnp.dot(of_rows.T, rows, preferred_element_type=jnp.float32)
        return for_x.astype(x.dtype).reshape(x.shape), for_table

    def rounded(x: Array, table: Array, gradient: Array) -> tuple[Array, Array]:
        return products(x, table, gradient.astype(x.dtype))

    x, table = kept
    for_x, for_table = jax.lax.platform_dependent(
        x, table.astype(x.dtype), gradient, cuda=rounded, rocm=rounded, default=products
    )
    return for_x, for_table.astype(table.dtype)


half_logits.defvjp(lambda x, table: (half_logits(x, table), (x, table)), _half_logits_backward)


@jax.custom_vjp
def add(x: Float[Array, "*batch"], parameter: Float[Array, "*rest"]) -> Float[Array, "*batch"]:
    """x + a parameter in its type, which is that of x's last axes; its gradient is float32."""
    return x + parameter.astype(x.dtype)


def _add_backward(parameter: Array, gradient: Array) -> tuple[Array, Array]:
    # In float32 from the start: over devices too, and XLA sums narrower types about five times
    # slower on CPUs.
    axes = tuple(range(gradient.ndim - parameter.ndim))
    return gradient, jnp.sum(gradient.astype(jnp.float32), axes).astype(parameter.dtype)


add.defvjp(lambda x, parameter: (add(x, parameter), parameter), _add_backward)


class Dense(nn.Module):
    """flax's Dense on the last axis, as one product of two matrices.

    Over several axes at once XLA takes the kernel's gradient by way of a slow transpose on CPUs:
    a layer alone goes back about three times faster this way, a whole step 1.05 to 1.15 times.
    """

    features: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = KERNEL_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch features"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = x.astype(self.dtype), jnp.asarray(kernel)
        if self.dtype == jnp.bfloat16:
            y = half_product(x, kernel)
        else:
            rows = x.reshape(-1, x.shape[-1])
            y = (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        return y if bias is None else add(y, jnp.asarray(bias))


def dense(
    x: Float[Array, "*batch width"],
    features: int,
    name: str,
    dtype: jnp.dtype,
    *,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = KERNEL_INIT,
) -> Float[Array, "*batch features"]:
    """A Dense of that name, in the module whose compact method calls it."""
    return Dense(features, dtype, use_bias, kernel_init, name=name)(x)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (arXiv 1502.03167), statistics in float32.

    In training it takes the mean and variance of the whole batch, over all devices, and moves the
    running ones (collection "batch_stats") towards them by `1 - momentum`. As in PyTorch the
    running variance is the unbiased one. Otherwise it takes the running ones.
    """

    dtype: jnp.dtype
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch width"], deterministic: bool
    ) -> Float[Array, "*batch width"]:
        width = x.shape[-1]
        scale = self.param("scale", self.scale_init, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        values = x.astype(jnp.float32)
        if deterministic:
            mean, var = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(values, axes)
            var = jnp.mean(jnp.square(values - mean), axes)
            if not self.is_initializing():
                count = x.size // width
                unbiased = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    running.value = self.momentum * running.value + (1.0 - self.momentum) * new
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((values - mean) * gain + bias).astype(self.dtype)


def recomputed(block: type[nn.Module], remat: bool, deterministic: int) -> type[nn.Module]:
    """The block, or one that keeps its input alone and is computed again for its gradient.

    Args:
      block: the class of a module.
      remat: whether to compute it again.
      deterministic: the place of that argument in its call, the first being 1.
    """
    return nn.remat(block, static_argnums=(deterministic,)) if remat else block


class MLP(nn.Module):
    """Linear -> activation -> linear, on the last axis."""

    ratio: float
    activation: str
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], deterministic: bool
    ) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        hidden = round(width * self.ratio)
        x = dense(x, hidden, "up", self.dtype)
        x = ACTIVATIONS[self.activation](x)
        x = dense(x, width, "down", self.dtype)
        return Dropout(self.dropout)(x, deterministic)


class Attention(nn.Module):
    """Multi-head self-attention that also tells what token merging asks for.

    Returns the output, the head-mean keys [batch, tokens, width/heads] and the head-mean attention
    on each token [batch, tokens], of the first token and the mean over all; what is not used is not
    computed.
    """

    heads: int
    dropout: float
    dtype: jnp.dtype
    form: str = "plain"  # see `attend`
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        deterministic: bool,
        lengths: Int[Array, "batch"] | None = None,
        size: Float[Array, "batch tokens"] | None = None,
    ) -> tuple[
        Float[Array, "batch tokens width"],
        Float[Array, "batch tokens head"],
        Float[Array, "batch tokens"],
        Float[Array, "batch tokens"],
    ]:
        """Attends over all tokens, without dropout if `deterministic`; the rest as in `attend`."""
        width = x.shape[-1]
        qkv = dense(x, 3 * width, "qkv", self.dtype)
        out, *seen = attend(qkv, self.heads, self.form, self.causal, lengths, size)
        out = dense(out, width, "out", self.dtype)
        keys, first, received = seen
        return Dropout(self.dropout)(out, deterministic), keys, first, received


class AttentionPool(nn.Module):
    """One learned query that attends over all tokens, then an MLP with a residual.

    The multi-head attention pooling of SigLIP's image encoder (arXiv 2303.15343, after
    arXiv 2106.04560).
    """

    heads: int
    mlp_ratio: float
    activation: str
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        deterministic: bool,
        size: Float[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch width"]:
        """Pools; the log of `size`, patches behind each token, is added to the logits."""
        width = x.shape[-1]
        probe = self.param("probe", KERNEL_INIT, (1, width))
        q = dense(probe.astype(self.dtype), width, "query", self.dtype)
        k, v = jnp.split(dense(x, 2 * width, "key_value", self.dtype), 2, axis=-1)
        q = rearrange(q, "one (h d) -> h (one d)", h=self.heads)
        k, v = (rearrange(part, "b t (h d) -> b h t d", h=self.heads) for part in (k, v))
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        logits = jnp.einsum("hd,bhkd->bhk", q, k, preferred_element_type=jnp.float32)
        if size is not None:
            logits = logits + jnp.log(size)[:, None, :]
        weights = jax.nn.softmax(logits, axis=-1)
        pooled = jnp.einsum("bhk,bhkd->bhd", weights.astype(self.dtype), v)
        pooled = dense(rearrange(pooled, "b h d -> b 1 (h d)"), width, "out", self.dtype)
        y = layer_norm("norm_mlp", self.dtype, self.epsilon)(pooled)
        y = MLP(self.mlp_ratio, self.activation, 0.0, self.dtype, name="mlp")(y, deterministic)
        return (pooled + y)[:, 0]


class Block(nn.Module):
    """A pre-LN transformer block without merging."""

    heads: int
    mlp_ratio: float
    activation: str
    dropout: float
    drop_path: float
    dtype: jnp.dtype
    epsilon: float = EPSILON  # of the norms
    attention_form: str = "plain"  # see `attend`
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        deterministic: bool,
        lengths: Int[Array, "batch"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        y = layer_norm("norm_attention", self.dtype, self.epsilon)(x)
        y, *_ = Attention(
            self.heads,
            self.dropout,
            self.dtype,
            self.attention_form,
            self.causal,
            name="attention",
        )(y, deterministic, lengths)
        x = x + DropPath(self.drop_path)(y, deterministic)
        y = layer_norm("norm_mlp", self.dtype, self.epsilon)(x)
        y = MLP(self.mlp_ratio, self.activation, self.dropout, self.dtype, name="mlp")(
            y, deterministic
        )
        return x + DropPath(self.drop_path)(y, deterministic)


class PatchEmbedding(nn.Module):
    """Pixels to one token a patch.

    stem "patch" is ViT's linear map of each patch. "conv" halves the grid by 3x3 convolutions
    until the patch size is reached (arXiv 2106.14881), which learns from far fewer images. The last
    pixels, which fill no patch, are not seen.
    """

    width: int
    patch_size: int
    stem: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width_px 3"]
    ) -> Float[Array, "batch rows columns width"]:
        rows, columns = (side // self.patch_size * self.patch_size for side in images.shape[1:3])
        x = images[:, :rows, :columns].astype(self.dtype)
        if self.stem == "patch":
            x = rearrange(
                x, "b (r p) (c q) ch -> b r c (p q ch)", p=self.patch_size, q=self.patch_size
            )
            return dense(x, self.width, "patch", self.dtype)
        halvings = self.patch_size.bit_length() - 1
        for index in range(halvings):
            channels = self.width >> (halvings - 1 - index)
            x = self._convolve(x, channels, 2, f"halving_{index}")
            if index:
                x = x + self._convolve(x, channels, 1, f"residual_{index}")
        return dense(x, self.width, "patch", self.dtype)

    def _convolve(self, x: Array, channels: int, stride: int, name: str) -> Array:
        """3x3 convolution, norm over the image, GELU."""
        x = nn.Conv(
            channels, (3, 3), stride, padding=1, use_bias=False, dtype=self.dtype, name=name
        )(x)
        norm = nn.GroupNorm(1, dtype=self.dtype, name=f"{name}_norm")
        # Without the barrier the TPU compiler recurses without end on the gradient, for v6e.
        return jax.nn.gelu(jax.lax.optimization_barrier(norm(x)))
