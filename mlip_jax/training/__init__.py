"""Training: the loop, its step and state, and what it leaves in a workdir."""
