"""Inputs of the verb prepare, and what it makes of them."""

import io
import json

import numpy as np
from PIL import Image

from mlip_jax import main as door


def picture(seed=0, size=(40, 30), form="JPEG", mode="RGB"):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size).convert(mode)
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def pictures(folder, number, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        (folder / f"{index}{suffix}").write_bytes(picture(index))


def run(*arguments):
    return door.main(["mlip", "prepare", "--workers=1", *arguments])


def prepare(tmp_path, source, *options, code=0):
    out = tmp_path / "out"
    assert run(f"--source={source}", f"--out={out}", *options) == code
    return out


def contents(folder):
    """The files that count: without the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def broken(out):
    return [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]


def index(out):
    return json.loads((out / "index.json").read_text())
