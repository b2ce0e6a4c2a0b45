"""Tar files in gzip: read as a stream, the same as unpacked ones."""

import gzip
import random

import pytest
from preparing import broken, contents, picture, prepare, reasons, records, run, sample, tar

from mlip_jax.data.prepare import containers

LENIENT = "--max-skipped-share=0.99"


def members(number, file=0):
    """Another image for each number and file: records of equal images would be one."""
    return [each for i in range(number) for each in sample(f"{i}", b"thing %d" % i, 100 * file + i)]


def test_the_same_records_as_unpacked(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    packed.mkdir()
    names = {"a": "a.tar.gz", "b": "b.tgz", "c": "c.tar"}  # the last is told by its content
    for number, (stem, name) in enumerate(names.items()):
        path = tar(plain / f"{stem}.tar", members(7, number))
        (packed / name).write_bytes(gzip.compress(path.read_bytes()))
    plain_records = records(prepare(tmp_path, f"webdataset:{plain}"))
    out = tmp_path / "of packed"
    source = f"--source=webdataset:{packed}"
    assert run(source, f"--out={out}", "--shard-records=3", "--workers=2") == 0
    packed_records = records(out)
    for stem, name in names.items():
        for i in range(7):
            record = packed_records[f"{packed}/{name}/{i}"]
            expected = plain_records[f"{plain}/{stem}.tar/{i}"]
            assert (record.image, record.captions) == (expected.image, expected.captions)
    assert len(packed_records) == 21
    again = tmp_path / "again"
    assert run(source, f"--out={again}", "--shard-records=3", "--workers=1") == 0
    assert contents(again) == contents(out)


def test_any_part_can_be_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_STEP", 100)
    data = random.Random(0).randbytes(5000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data[:2000]) + gzip.compress(data[2000:]))
    drawn = random.Random(1)
    with containers.opened(path) as container:
        for _ in range(200):
            size, offset = drawn.randrange(600), drawn.randrange(5500)
            assert container.read(size, offset) == data[offset : offset + size]
            assert container.reach(offset) == min(offset, 5000)


def test_what_is_cut_short_or_damaged_keeps_what_comes_before(tmp_path):
    data, other = (
        gzip.compress(tar(tmp_path / "a.tar", members(9, file)).read_bytes(), 1) for file in (0, 1)
    )
    source = tmp_path / "in"
    source.mkdir()
    (source / "cut.tgz").write_bytes(other[: len(other) * 2 // 3])
    (source / "sum.tgz").write_bytes(data[:-8] + bytes(4) + data[-4:])
    (source / "page.tgz").write_bytes(gzip.compress(b"<html>404 not found</html>"))
    (source / "none.tgz").write_bytes(b"\x1f\x8b" + bytes(600))
    out = prepare(tmp_path, f"webdataset:{source}", LENIENT)
    loaded = records(out)
    of_cut = [name for name in loaded if "cut.tgz" in name]
    assert 3 <= len(of_cut) < 9 and len(loaded) - len(of_cut) == 9
    reason_of = {name.removeprefix(f"{source}/"): reason for name, reason in reasons(out).items()}
    assert (
        "cannot read the tar file to its end: what is packed is cut short" in reason_of["cut.tgz"]
    )
    assert "what is packed is damaged: CRC" in reason_of["sum.tgz"]
    assert "what is packed is damaged" in reason_of["none.tgz"]
    assert "not a tar file" in reason_of["page.tgz at byte 0"]


@pytest.mark.parametrize("ending", ["jpg", "txt"])
def test_bombs_are_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(containers, "_ALWAYS", 2**16)
    bomb = {"jpg": picture(), "txt": b"a bomb"} | {ending: bytes(2**24)}
    pairs = [*sample("0"), *((f"1.{end}", data) for end, data in bomb.items()), *sample("2")]
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar(tmp_path / "a.tar", pairs).read_bytes()))
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    assert set(records(out)) == {f"{path}/0"}
    assert "unpacks to more than 100 times its size: the rest is refused" in reasons(out)[f"{path}"]


def test_members_that_are_apart_are_refused(tmp_path):
    pairs = [("0.jpg", picture()), *sample("1"), ("0.txt", b"far")]
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar(tmp_path / "a.tar", pairs).read_bytes()))
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    assert set(records(out)) == {f"{path}/1"}
    messages = [each["reason"] for each in broken(out) if each["record"] == f"{path}/0"]
    beside = "beside it, as it must in a packed tar file"
    assert messages == [f"has no caption, class or JSON {beside}", f"has no image {beside}"]
