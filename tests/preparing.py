"""Inputs of the subcommand prepare, and what it makes of them."""

import io
import json
import tarfile
import zlib

import numpy as np
from PIL import Image

from mlip_jax import main as door
from mlip_jax.data.sets.opening import open_source


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


def tar(path, members, **options):
    """Members are (name, bytes), or a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption=b"a thing", seed=None):
    """An image, by itself another one for each key, and a caption."""
    seed = zlib.crc32(key.encode()) if seed is None else seed
    return [(f"{key}.jpg", picture(seed)), (f"{key}.txt", caption)]


def reasons(out):
    return {each["record"]: each["reason"] for each in broken(out)}


def records(out, split="train"):
    source = open_source(f"prepared:{out}", split)
    return {source.name_of(i): source[i] for i in range(len(source))}
