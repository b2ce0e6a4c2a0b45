"""From files to batches. Nothing in here imports JAX: worker processes start fast."""
