"""Prepared datasets in buckets, against servers on the loopback: brought, kept, bounded."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_jax import main
from mlip_jax.core.buckets import Mirror
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.sets.shards import SHARD_SUFFIX


@pytest.fixture(scope="module")
def prepared(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "set"
    flags = [f"--source=jsonl:{pairs}", f"--out={folder}", "--shard-records=10", "--workers=1"]
    assert main.main(["mlip", "prepare", *flags]) == 0
    return folder


@pytest.fixture
def upload(bucket, prepared):
    """Copies the dataset to a URL, which it gives."""

    def act(name="set"):
        url = f"{bucket}/{name}"
        Mirror(url, prepared).publish(prepared)
        return url

    yield act
    cache_room.let_go()


def shards_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob(f"*{SHARD_SUFFIX}"))


def test_a_dataset_in_a_bucket_has_the_records_of_the_same_on_the_disk(
    upload, prepared, tmp_path, capfd
):
    here = open_source(f"prepared:{prepared}", "train")
    there = open_source(f"prepared:{upload()}", "train")
    assert "bringing 8 files" in capfd.readouterr().err
    assert there.name == here.name and len(there) == len(here) == 32
    assert [there[i] for i in range(32)] == [here[i] for i in range(32)]
    assert list(there.captions()) == list(here.captions())
    assert pickle.loads(pickle.dumps(there))[31] == here[31]  # as worker processes have it
    assert len(shards_in(tmp_path / "cache")) == 4, "the other split is not brought"
    validation = open_source(f"prepared:{upload()}#validation", "train")
    assert len(validation) == 8 and "bringing 2 files" in capfd.readouterr().err


def test_what_is_here_is_not_brought_again_and_is_shared_by_processes(upload, tmp_path, capfd):
    url = upload()
    program = (
        "from mlip_jax.data.sets.opening import open_source;"
        f"print(len(open_source('prepared:{url}', 'train')))"
    )
    command = [sys.executable, "-c", program]
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [output for output, _ in outputs] == ["32\n", "32\n"], outputs
    assert sum("bringing" in errors for _, errors in outputs) == 1
    open_source(f"prepared:{url}", "train")
    assert "bringing" not in capfd.readouterr().err


def test_a_file_that_is_not_what_the_index_says_is_named(upload, prepared):
    url = upload()
    name = shards_in(prepared)[0]
    there = Mirror(url, prepared)
    content = there.read(name)
    there.write(name, content[:-1] + b"?")
    with pytest.raises(UserError, match=f"{url} is damaged: {name} is not what the index says"):
        open_source(f"prepared:{url}", "train")
    there.write(name, content[:100])
    with pytest.raises(UserError, match=f"{name} is not what the index says, it was changed or"):
        open_source(f"prepared:{url}", "train")
    there.delete(name)
    with pytest.raises(UserError, match=f"{url} is damaged: {name} is missing"):
        open_source(f"prepared:{url}", "train")
    there.write(name, content)
    assert len(open_source(f"prepared:{url}", "train")) == 32


def test_a_dataset_that_was_made_again_is_brought_again(upload, tmp_path):
    url = upload()
    open_source(f"prepared:{url}", "train")
    brought = next((tmp_path / "cache").rglob("brought.json"))
    brought.write_text(brought.read_text().replace('": "', '": "0'))  # of another content
    shard = next((tmp_path / "cache").rglob(f"*{SHARD_SUFFIX}"))
    content = shard.read_bytes()
    shard.write_bytes(b"?" * len(content))
    open_source(f"prepared:{url}", "train")
    assert shard.read_bytes() == content


def test_unused_datasets_make_room_and_one_in_use_does_not(upload, tmp_path, monkeypatch):
    first, second = upload("first"), upload("second")
    open_source(f"prepared:{first}", "train")
    cache = tmp_path / "cache"
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    monkeypatch.setenv("MLIP_JAX_CACHE_GIB", str(1.5 * size / 2**30))
    with pytest.raises(UserError, match="needs .* set MLIP_JAX_CACHE_GIB higher, or config.data."):
        open_source(f"prepared:{second}", "train")
    cache_room.let_go()
    assert len(open_source(f"prepared:{second}", "train")) == 32
    assert [path.name for path in cache.glob("datasets/*/*/")] == ["second"]


# A run of prepare that is killed when its second shard is in the bucket.
KILLED = """
import os, signal, sys
from mlip_jax import main
from mlip_jax.data.prepare.make import Maker

hand_over, calls = Maker.hand_over, []

def killed(self, made):
    hand_over(self, made)
    calls.append(made)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Maker.hand_over = killed
sys.exit(main.main(["mlip", *sys.argv[1:]]))
"""


def test_prepare_brings_shards_one_by_one_and_goes_on_after_a_kill(
    bucket, upload, prepared, pairs, tmp_path, capfd
):
    url = f"{bucket}/made"
    flags = [f"--source=jsonl:{pairs}", f"--out={url}", "--shard-records=10"]
    program = [sys.executable, "-c", KILLED, "prepare", *flags, "--workers=2"]
    assert subprocess.run(program, cwd=Path(__file__).parents[1]).returncode == -signal.SIGKILL
    there = Mirror(url, tmp_path)
    before = {name for name in there.sizes(tmp_path) if name.endswith(SHARD_SUFFIX)}
    assert len(before) >= 2 and "index.json" not in there.sizes(tmp_path)
    capfd.readouterr()
    assert main.main(["mlip", "prepare", *flags, "--workers=1"]) == 0
    output = capfd.readouterr()
    assert f"{url}: 40 images" in output.out and f"prepared:{url}" in output.out
    made = {name: there.read(name) for name in there.sizes(tmp_path)}
    expected = {path.name: path.read_bytes() for path in prepared.iterdir() if path.is_file()}
    assert made.keys() == expected.keys() - {".lock"}
    shards = [name for name in made if name.startswith("train-")]
    assert shards and all(made[name] == expected[name] for name in shards)
    assert len(open_source(f"prepared:{url}", "train")) == 32
    assert main.main(["mlip", "prepare", f"--out={url}", "--check"]) == 0
    assert "10 of 10 files have their sizes" in capfd.readouterr().out
    assert main.main(["mlip", "prepare", *flags[:2], "--shard-records=20"]) == 2
    assert f"{url} holds a dataset that was prepared differently" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prepared:{url}", "holds no index.json: check the URL"),
        ("jsonl:{url}/pairs.jsonl", "read from this machine alone"),
    ],
)
def test_what_is_no_prepared_dataset_is_one_line(bucket, upload, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec.format(url=bucket), "train")
