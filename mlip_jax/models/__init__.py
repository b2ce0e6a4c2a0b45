"""Pure Flax Linen modules: the encoders, their heads and the functions that they are made of."""
