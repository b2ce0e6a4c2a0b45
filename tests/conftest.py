"""What every test stands on: 8 virtual CPU devices, no display, shapes checked at run time."""

import os
from pathlib import Path

# Before JAX is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["MPLBACKEND"] = "Agg"
# Programs that several tests, or the processes they start, share are compiled once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated shape in these rooms is checked at each call.
install_import_hook(["mlip_jax.objectives", "mlip_jax.models"], "beartype.beartype")
