"""Sources of `prepare` that lie in buckets, against servers on the loopback."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import contents, index, picture, pictures, run, tar

from mlip_jax.core import object_store
from mlip_jax.core.buckets import Mirror
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.opening import open_source


def same_records(one, other, folder, url):
    """Whether two prepared datasets have the same records, of a folder and of its copy there."""
    for split in {shard["split"] for shard in index(one)["shards"]}:
        here, there = (open_source(f"prepared:{out}#{split}", "train") for out in (one, other))
        assert len(here) == len(there) > 0
        for place in range(len(here)):
            record, copied = here[place], there[place]
            assert copied.name.replace(url, str(folder)) == record.name
            assert (copied.image, copied.captions) == (record.image, record.captions)
            assert copied.label == record.label


def test_rows_with_images_beside_are_brought_and_called_as_they_are_there(
    upload, tmp_path, capfd, monkeypatch
):
    folder, out, again = tmp_path / "source", tmp_path / "out", tmp_path / "again"
    pictures(folder / "images", 6)
    rows = [{"file": f"images/{n}.jpg", "caption": f"number {n}"} for n in range(6)]
    rows.append({"file": "images/none.jpg", "caption": "no image"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url = upload(folder)
    flags = (f"--source=jsonl:{url}/rows.jsonl", "--max-skipped-share=1")
    assert run(*flags, f"--out={out}") == 0
    errors = capfd.readouterr().err
    assert f"{url}/rows.jsonl: bringing 7 files" in errors
    assert (
        run(f"--source=jsonl:{folder}/rows.jsonl", "--max-skipped-share=1", f"--out={again}") == 0
    )
    same_records(again, out, folder, url)
    assert f"{url}/rows.jsonl:7 images/none.jpg" in (out / "broken.jsonl").read_text()
    written = b"".join(contents(out).values())
    assert str(tmp_path).encode() not in written and url.encode() in written

    # On another machine, in effect: the copy lies elsewhere, and the shards are the same.
    monkeypatch.setenv("MLIP_JAX_CACHE", str(tmp_path / "other"))
    capfd.readouterr()
    assert run(*flags, f"--out={out}") == 0
    output = capfd.readouterr()
    assert "bringing 7 files" in output.err and b"".join(contents(out).values()) == written

    # What changed there is brought again, and is another source.
    Mirror(url, folder).write("images/1.jpg", picture(77))
    Mirror(url, folder).delete("images/2.jpg")
    assert run(*flags, f"--out={out}") == 0
    assert "bringing 1 files" in capfd.readouterr().err


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)  # one is enough for the kinds
@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "csv"])
def test_every_kind_that_lies_in_files_is_read(upload, tmp_path, kind, capfd):
    folder = tmp_path / "source"
    where = "/{000..001}.tar" if kind == "webdataset" else ""
    if kind == "webdataset":
        for number in range(3):
            members = [(f"{number}.jpg", picture(number)), (f"{number}.txt", b"caption")]
            tar(folder / f"{number:03d}.tar", members)
    elif kind == "parquet":
        folder.mkdir()
        for split in ("train", "validation"):
            table = pa.table({"image": [picture(1), picture(2)], "text": ["one", split]})
            pq.write_table(table, folder / f"{split}.parquet")
    elif kind == "folder":
        for name in ("train/cat", "train/dog", "val/cat"):
            pictures(folder / name, 2)
    else:
        where = "/rows.csv"
        pictures(folder, 3)
        (folder / "rows.csv").write_text("file,caption\n0.jpg,one\n1.jpg,two\n0.jpg,other\n")
    url = upload(folder)
    one, other = tmp_path / "one", tmp_path / "other"
    assert run(f"--source={kind}:{folder}{where}", f"--out={one}") == 0
    capfd.readouterr()
    assert run(f"--source={kind}:{url}{where}", f"--out={other}") == 0
    same_records(one, other, folder, url)
    if kind == "webdataset":
        assert "bringing 2 files" in capfd.readouterr().err, "no more than the pattern names"


# A run of prepare that is killed when three of its files are here.
KILLED = """
import os, signal, sys
from mlip_jax import main
from mlip_jax.data.prepare import in_bucket

download, brought = in_bucket._download, []
in_bucket._AT_ONCE = 1

def killed(*arguments):
    if len(brought) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    download(*arguments)
    brought.append(arguments)

in_bucket._download = killed
sys.exit(main.main(["mlip", "prepare", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)
def test_a_killed_run_brings_what_is_lacking(upload, tmp_path, capfd):
    folder = tmp_path / "source"
    pictures(folder / "cat", 3)
    pictures(folder / "dog", 4)
    flags = [f"--source=folder:{upload(folder)}", f"--out={tmp_path / 'out'}"]
    program = [sys.executable, "-c", KILLED, *flags]
    assert subprocess.run(program, cwd=Path(__file__).parents[1]).returncode == -signal.SIGKILL
    log = next((tmp_path / "cache").rglob("brought.jsonl"))
    log.write_text(log.read_text() + '["cat/')  # killed in the middle of a line
    assert run(*flags) == 0
    assert "bringing 4 files" in capfd.readouterr().err
    assert len(open_source(f"prepared:{tmp_path / 'out'}", "train")) == 7


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)
def test_what_cannot_be_brought_is_one_line(upload, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "source"
    pictures(folder / "cat", 2)
    url = upload(folder)

    def fails(source, *words, code=2):
        assert run(f"--source={source}", f"--out={tmp_path / 'out'}") == code
        errors = capfd.readouterr().err
        assert errors.count("error: ") == 1 and errors.count("Traceback") == 0, errors
        assert all(word in errors for word in words), errors

    fails(f"folder:{url}/none", f"there is no file in: {url}/none")
    fails(f"webdataset:{url}", f"there is no tar file in: {url}")
    fails(f"webdataset:{url}/0.tar", f"no such file: {url}/0.tar")
    fails("folder:gs://no-such-bucket/x", "there is no bucket gs://no-such-bucket")
    fails(f"nothing:{url}", "expected KIND:PATH")
    fails(f"jsonl:{url}/cat/0.jpg", f"{url}/cat/0.jpg")  # an error of the reader names it so
    monkeypatch.setenv(cache_room.LIMIT, "0.0000001")
    fails(f"folder:{url}", f"{url} needs", "or MLIP_JAX_CACHE to a folder on a larger disk")
    monkeypatch.delenv(cache_room.LIMIT)
    download = object_store.Bucket.download

    def changed(bucket, name, target):
        bucket.write(name, picture(9))
        return download(bucket, name, target)

    monkeypatch.setattr(object_store.Bucket, "download", changed)
    fails(f"folder:{url}", "was changed while it was read: run the same command again", code=1)
