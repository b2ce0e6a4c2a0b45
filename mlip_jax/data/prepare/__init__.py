"""The subcommand prepare: any kind of dataset -> ArrayRecord shards with an index and a card."""

from mlip_jax.data.prepare.verb import prepare

__all__ = ["prepare"]
