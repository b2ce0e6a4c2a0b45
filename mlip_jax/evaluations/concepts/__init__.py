"""Concept editing: what is removed from a model, and what remains."""
