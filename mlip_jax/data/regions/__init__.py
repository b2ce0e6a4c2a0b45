"""Images with named regions: what grounding is evaluated on."""
