"""From files to batches. Nothing in here imports JAX: worker processes start fast."""

import warnings

# Grain's generated code is a major version older than the Protobuf that TensorFlow Datasets needs,
# which warns at each start, and reads it.
warnings.filterwarnings("ignore", "Protobuf gencode version", UserWarning)
