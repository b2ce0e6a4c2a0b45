"""`python -m mlip_jax`: the same program as the console script `mlip`."""

from mlip_jax.main import run

# Processes that load data import the main program again.
if __name__ == "__main__":
    run()
