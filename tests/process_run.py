"""What each process of test_processes.py runs: the command line, and a record of what it is fed."""

import json
import os
import sys
import time
import zlib
from pathlib import Path

from mlip_jax import main as door
from mlip_jax.training import evaluation, stages


def recorded(train_batches, record, pause):
    """`train_batches` that takes its time and notes, a line a step, what it gives."""

    def batches(*arguments, **options):
        with record.open("a", buffering=1) as lines:
            for batch in train_batches(*arguments, **options):
                images = [zlib.crc32(image) for image in batch["image"]]
                skipped = [int(index) for index in batch["skipped"] if index >= 0]
                lines.write(json.dumps({"images": images, "skipped": skipped}) + "\n")
                yield batch
                time.sleep(pause)

    return batches


if __name__ == "__main__":
    stages.train_batches = recorded(
        stages.train_batches, Path(os.environ["RECORD"]), float(os.environ["PAUSE"])
    )
    evaluation.write_report = lambda *_: "none"
    sys.exit(door.main(sys.argv))
