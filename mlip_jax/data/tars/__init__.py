"""Tar shards that are trained on as they are."""
