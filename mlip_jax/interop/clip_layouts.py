"""The layouts that are known: open_clip's and Hugging Face's, of CLIP and of SigLIP."""

from __future__ import annotations

from mlip_jax.interop.layouts import Layout, Part

_SCALES = {
    "log_scale_spatial_global": Part(("logit_scale",), "same"),
    "bias_spatial_global": Part(("logit_bias",), "same"),
}


def _matrix(key: str, name: str, kind: str) -> dict[str, Part]:
    """A projection and its bias."""
    return {
        f"{key}/kernel": Part((f"{name}.weight",), kind),
        f"{key}/bias": Part((f"{name}.bias",), "same"),
    }


_IMAGE_HEAD, _TEXT_HEAD = (
    "image_heads_spatial_global/projection",
    "text_heads_text_global/projection",
)
_PATCH = "image_encoder/patch_embedding/patch"
# The global view is the joint space's already: SigLIP has no projection of images.
_NO_IMAGE_HEAD = {
    f"{_IMAGE_HEAD}/kernel": Part((), "identity"),
    f"{_IMAGE_HEAD}/bias": Part((), "zero"),
}
_WITHOUT_PATCH_BIAS = {f"{_PATCH}/bias": Part((), "zero")}


def _blocks(path: str, prefix: str, names: tuple[str, ...]) -> dict[str, str]:
    modules = ("norm_attention", "attention/qkv", "attention/out", "norm_mlp", "mlp/up", "mlp/down")
    return {
        f"{path}/{module}": f"{prefix}.{name}"
        for module, name in zip(modules, names, strict=True)
        if name
    }


_OPEN_CLIP_BLOCK = ("ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_TIMM_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_HUGGING_FACE_BLOCK = ("layer_norm1", "", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")


def open_clip(*, text_prefix: str, siglip: bool, text_bias: bool, image_bias: bool) -> Layout:
    """open_clip's layout.

    Args:
      text_prefix: "text." where the text encoder is a module of its own (custom_text), else "".
      siglip: the image encoder is timm's ViT with attention pooling, not open_clip's own.
      text_bias: the projection of texts has a bias, and is a module then.
      image_bias: this package's projections have biases, open_clip's of images none.
    """
    text = text_prefix
    projection = f"{text}text_projection"
    parts = dict(_SCALES) | {
        "text_encoder/embedding": Part((f"{text}token_embedding.weight",), "same"),
        "text_encoder/position": Part((f"{text}positional_embedding",), "same"),
    }
    if text_bias:
        parts |= _matrix(_TEXT_HEAD, projection, "linear")
    else:
        parts |= {
            f"{_TEXT_HEAD}/kernel": Part((projection,), "same"),
            f"{_TEXT_HEAD}/bias": Part((), "zero"),
        }
    modules = {"text_encoder/norm": f"{text}ln_final"} | _blocks(
        "text_encoder/block_{}", f"{text}transformer.resblocks.{{}}", _OPEN_CLIP_BLOCK
    )
    if siglip:
        return _timm(parts, modules)
    parts |= _WITHOUT_PATCH_BIAS | {
        "image_encoder/class_token": Part(
            ("visual.class_embedding", "visual.positional_embedding#0"), "class"
        ),
        "image_encoder/position": Part(("visual.positional_embedding#1",), "grid"),
        f"{_PATCH}/kernel": Part(("visual.conv1.weight",), "patch"),
        f"{_IMAGE_HEAD}/kernel": Part(("visual.proj",), "same"),
    }
    if image_bias:
        parts[f"{_IMAGE_HEAD}/bias"] = Part((), "zero")
    modules |= {
        "image_encoder/norm_pre": "visual.ln_pre",
        "image_encoder/norm_spatial": "visual.ln_post",
    } | _blocks("image_encoder/spatial_{}", "visual.transformer.resblocks.{}", _OPEN_CLIP_BLOCK)
    return Layout("open_clip", parts, modules, cut={"visual.positional_embedding": 1})


def _timm(parts: dict[str, Part], modules: dict[str, str]) -> Layout:
    pool = "visual.trunk.attn_pool"
    parts |= _NO_IMAGE_HEAD | {
        "image_encoder/position": Part(("visual.trunk.pos_embed",), "grid"),
        "image_encoder/pool/probe": Part((f"{pool}.latent",), "same"),
    }
    parts |= _matrix(_PATCH, "visual.trunk.patch_embed.proj", "patch")
    modules |= {
        "image_encoder/norm_spatial": "visual.trunk.norm",
        "image_encoder/pool/query": f"{pool}.q",
        "image_encoder/pool/key_value": f"{pool}.kv",
        "image_encoder/pool/out": f"{pool}.proj",
        "image_encoder/pool/norm_mlp": f"{pool}.norm",
        "image_encoder/pool/mlp/up": f"{pool}.mlp.fc1",
        "image_encoder/pool/mlp/down": f"{pool}.mlp.fc2",
    } | _blocks("image_encoder/spatial_{}", "visual.trunk.blocks.{}", _TIMM_BLOCK)
    led = ("visual.trunk.pos_embed", f"{pool}.latent")
    return Layout("open_clip's SigLIP", parts, modules, led=led)


def timm_vit(*, pre_norm: bool) -> Layout:
    """timm's ViT alone, with a class token; its parameters are the image encoder's.

    Args:
      pre_norm: it is one of CLIP's: a norm precedes the blocks, and its patches have no bias.
    """
    parts = {
        "image_encoder/class_token": Part(("cls_token", "pos_embed#0"), "class"),
        "image_encoder/position": Part(("pos_embed#1",), "grid"),
    } | _matrix(_PATCH, "patch_embed.proj", "patch")
    modules = {"image_encoder/norm_spatial": "norm"}
    if pre_norm:
        parts |= _WITHOUT_PATCH_BIAS
        modules["image_encoder/norm_pre"] = "norm_pre"
    modules |= _blocks("image_encoder/spatial_{}", "blocks.{}", _TIMM_BLOCK)
    led = ("pos_embed", "cls_token", "cls_token")
    return Layout(
        "timm", parts, modules, cut={"pos_embed": 1}, led=led, skipped=r"^(head|fc_norm)\."
    )


def _hugging_face(
    parts: dict[str, Part], modules: dict[str, str]
) -> tuple[dict[str, Part], dict[str, str], dict[str, tuple[str, ...]]]:
    """What CLIP and SigLIP share: parts, modules, and modules of three matrices."""
    embeddings = "text_model.embeddings"
    parts |= dict(_SCALES) | {
        "text_encoder/embedding": Part((f"{embeddings}.token_embedding.weight",), "same"),
        "text_encoder/position": Part((f"{embeddings}.position_embedding.weight",), "same"),
    }
    joined = {}
    for path, tower in (
        ("image_encoder/spatial_{}", "vision_model"),
        ("text_encoder/block_{}", "text_model"),
    ):
        layer = f"{tower}.encoder.layers.{{}}"
        modules |= _blocks(path, layer, _HUGGING_FACE_BLOCK)
        joined[f"{path}/attention/qkv"] = tuple(
            f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v")
        )
    modules |= {
        "text_encoder/norm": "text_model.final_layer_norm",
        "image_encoder/norm_spatial": "vision_model.post_layernorm",
    }
    return parts, modules, joined


def hugging_face_clip() -> Layout:
    """Hugging Face's `CLIPModel`."""
    embeddings = "vision_model.embeddings"
    positions = f"{embeddings}.position_embedding.weight"
    parts, modules, joined = _hugging_face(
        _WITHOUT_PATCH_BIAS
        | {
            "image_encoder/class_token": Part(
                (f"{embeddings}.class_embedding", f"{positions}#0"), "class"
            ),
            "image_encoder/position": Part((f"{positions}#1",), "grid"),
            f"{_PATCH}/kernel": Part((f"{embeddings}.patch_embedding.weight",), "patch"),
            f"{_IMAGE_HEAD}/kernel": Part(("visual_projection.weight",), "linear"),
            f"{_TEXT_HEAD}/kernel": Part(("text_projection.weight",), "linear"),
        },
        {"image_encoder/norm_pre": "vision_model.pre_layrnorm"},
    )
    return Layout("Hugging Face's CLIPModel", parts, modules, joined, cut={positions: 1})


def hugging_face_siglip() -> Layout:
    """Hugging Face's `SiglipModel`."""
    embeddings, head = "vision_model.embeddings", "vision_model.head"
    mixed = f"{head}.attention.in_proj_"
    parts, modules, joined = _hugging_face(
        _NO_IMAGE_HEAD
        | _matrix(_PATCH, f"{embeddings}.patch_embedding", "patch")
        | {
            "image_encoder/position": Part((f"{embeddings}.position_embedding.weight",), "grid"),
            "image_encoder/pool/probe": Part((f"{head}.probe",), "same"),
            "image_encoder/pool/query/kernel": Part((f"{mixed}weight#0",), "linear"),
            "image_encoder/pool/query/bias": Part((f"{mixed}bias#0",), "same"),
            "image_encoder/pool/key_value/kernel": Part((f"{mixed}weight#1",), "linear"),
            "image_encoder/pool/key_value/bias": Part((f"{mixed}bias#1",), "same"),
        },
        {
            "image_encoder/pool/out": f"{head}.attention.out_proj",
            "image_encoder/pool/norm_mlp": f"{head}.layernorm",
            "image_encoder/pool/mlp/up": f"{head}.mlp.fc1",
            "image_encoder/pool/mlp/down": f"{head}.mlp.fc2",
            _TEXT_HEAD: "text_model.head",
        },
    )
    cut = {f"{mixed}weight": 1 / 3, f"{mixed}bias": 1 / 3}
    return Layout("Hugging Face's SiglipModel", parts, modules, joined, cut, (f"{head}.probe",))
