"""The losses of the token level as functions of plain arguments."""

from mlip_jax.core.registry import LOSSES
from mlip_jax.objectives.losses import Scoring, Tokens


def token_loss(loss, image_tokens, text_tokens, image_weights, text_mask, scale, bias=0.0, **how):
    """The loss of that name; `how` is the rest of a `Scoring`, plain where it says nothing."""
    tokens = Tokens(image_tokens, text_tokens, image_weights, text_mask)
    return LOSSES[loss].of_tokens(tokens, Scoring(scale, bias, **{"blocks": "never"} | how))
