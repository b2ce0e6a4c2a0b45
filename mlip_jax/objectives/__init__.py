"""Contrastive objectives: arrays in, scalars out. They know no model."""

from mlip_jax.objectives.contrastive import jsd, sigmoid_contrastive, softmax_contrastive
from mlip_jax.objectives.tokenwise import tokenwise_similarity

__all__ = ["jsd", "sigmoid_contrastive", "softmax_contrastive", "tokenwise_similarity"]
