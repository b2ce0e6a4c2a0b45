"""Class folders in zip files: layouts, damage, and names that are not to be trusted."""

import io
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.records import MissingSplit


def png(value=0):
    out = io.BytesIO()
    Image.new("L", (5, 5), value).save(out, "PNG")
    return out.getvalue()


def pack(path, names, method=zipfile.ZIP_DEFLATED):
    """A zip file with an image, each another, for each of the names; its spec."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for value, name in enumerate(names):
            archive.writestr(name, png(value) if "png" in name.lower() else name)
    return f"zip:{path}"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_are_read_by_offset(tmp_path, method):
    names = ["big_cat/1.png", "dog/x.PNG", "dog/deep/3.png"]
    spec = pack(tmp_path / "pets.zip", ["big_cat/", *names, "notes.txt", "__MACOSX/dog/._x.png"])
    source = pickle.loads(pickle.dumps(open_evaluation(spec)))
    assert (source.name, source.split, len(source)) == ("pets", "train", 3)
    assert source.class_names == ("big cat", "dog")
    assert [source[i].captions for i in range(3)] == [("big cat",), ("dog",), ("dog",)]
    assert source[0].name == source.name_of(0) == f"{tmp_path}/pets.zip/big_cat/1.png"
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        for record in ThreadPoolExecutor(4).map(source.__getitem__, [0, 1, 2] * 20):
            stored = record.name.removeprefix(f"{tmp_path}/pets.zip/")
            assert record.image == archive.read(stored)
    labels = dict(zip(sorted(names), [0, 1, 1], strict=True))
    for index in range(3):
        stored = source.name_of(index).removeprefix(f"{tmp_path}/pets.zip/")
        assert source[index].label == labels[stored]


@pytest.mark.parametrize("kind", ["folder", "zip", "zips"])
def test_what_is_hidden_is_left_out(tmp_path, kind):
    names = ["train/cat/1.png", "train/dog/2.png", "test/dog/3.png"]
    hidden = [
        ".ipynb_checkpoints/cat/1.png",
        "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/cat/.ipynb_checkpoints/1-checkpoint.png",
        "train/cat/._1.png",
        "__MACOSX/train/cat/._1.png",
        "__MACOSX/train/emu/2.png",
    ]
    place = tmp_path / ".cache/pets"  # which may lie in a hidden folder itself
    if kind == "folder":
        for name in names + hidden:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(png() if name in names else b"no image")
    else:
        place = place / "pets.zip"
        pack(place, names + hidden)
        if kind == "zips":
            place = place.parent
            (place / "._pets.zip").write_bytes(b"no zip")
    spec = f"{'folder' if kind == 'folder' else 'zip'}:{place}"
    train = open_source(spec, "train")
    assert train.class_names == ("cat", "dog")
    found = [train.name_of(i).removeprefix(f"{place}/") for i in range(len(train))]
    assert [name.removeprefix("pets.zip/") for name in found] == names[:2]
    assert len(open_evaluation(spec)) == 1


@pytest.mark.parametrize(
    "zips",
    [
        {"all.zip": ["train/cat/1.png", "train/dog/2.png", "test/dog/3.png"]},
        {"all.zip": ["top/train/cat/1.png", "top/train/dog/2.png", "top/test/dog/3.png"]},
        {"train_1.zip": ["train/cat/1.png", "train/dog/2.png"], "test.zip": ["test/dog/3.png"]},
        {"a.zip": ["top/train/cat/1.png", "top/train/dog/2.png"], "b.zip": ["top/test/dog/3.png"]},
        {"train.zip": ["cat/1.png", "dog/2.png"], "test.zip": ["dog/3.png"]},
        {"train.zip": ["photos/cat/1.png", "photos/dog/2.png"], "val.ZIP": ["dog/3.png"]},
        {"all.zip": ["./train\\cat\\1.png", "train\\dog\\2.png", "test//dog/3.png"]},
    ],
)
def test_zip_files_make_one_tree(tmp_path, zips):
    for name, members in zips.items():
        pack(tmp_path / "pets" / name, members)
    spec = f"zip:{tmp_path / 'pets'}"
    train, test = open_source(spec, "train"), open_evaluation(spec)
    assert (train.name, test.name) == ("pets", "pets")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [train[i].label for i in range(len(train))] == [0, 1]
    assert [test[i].label for i in range(len(test))] == [1]
    assert test.split == "validation" and test.name_of(0).endswith("3.png")
    together = open_evaluation(f"{spec}#all")
    assert len(together) == 3 and len({together[i].name for i in range(3)}) == 3
    if len(zips) == 1:
        alone = open_evaluation(f"zip:{tmp_path / 'pets/all.zip'}#train")
        assert (alone.split, len(alone)) == ("train", 2)


def test_a_zip_called_by_its_split(tmp_path):
    spec = pack(tmp_path / "test.zip", ["cat/1.png"])
    assert open_evaluation(spec).parts == ("test",)
    with pytest.raises(MissingSplit, match="test.zip has no train split, only test"):
        open_source(spec, "train")


def test_a_class_without_an_image_stays(tmp_path):
    source = open_evaluation(pack(tmp_path / "a.zip", ["train/cat/1.png", "test/dog/2.png"]))
    assert source.class_names == ("cat", "dog") and [source[0].label] == [1]


def test_damaged_member(tmp_path):
    spec = pack(tmp_path / "a.zip", ["cat/1.png", "cat/2.png"], zipfile.ZIP_STORED)
    source = open_evaluation(spec)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        source[0]
    assert source[1].image == png(1)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(OSError, match="damaged"):
        source[1]
    (tmp_path / "a.zip").unlink()
    with pytest.raises(OSError):
        source[1]


def test_damaged_deflation(tmp_path):
    source = open_evaluation(pack(tmp_path / "a.zip", ["cat/1.png"]))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[39] = 0xFF  # a block of a type that there is not
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        source[0]


def alter(path, *, flags=None, size=None, method=None):
    """Changes the entry of the first member in the archive's directory."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    for offset, form, value in ((8, "<H", flags), (10, "<H", method), (24, "<I", size)):
        if value is not None:
            struct.pack_into(form, content, entry + offset, value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cat/1.png", {"flags": 1}, "a.zip: cat/1.png is encrypted"),
        ("cat/1.png", {"method": 14}, "a.zip: cat/1.png is neither stored nor packed by deflate"),
        ("cat/../../1.png", {}, "a.zip: the path 'cat/../../1.png' leads out of the archive"),
        ("/etc/cat/1.png", {}, "a.zip: the path '/etc/cat/1.png' leads out"),
        ("C:\\cat\\1.png", {}, "a.zip: the path .* leads out"),
        ("cat/1.txt", {}, "no images in .*a.zip: expected .*a.zip/CLASS/"),
    ],
)
def test_refused_members(tmp_path, name, change, message):
    spec = pack(tmp_path / "a.zip", [name])
    alter(tmp_path / "a.zip", **change)
    with pytest.raises(UserError, match=message) as caught:
        open_evaluation(spec)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_too_large_is_unreadable(tmp_path):
    spec = pack(tmp_path / "a.zip", ["cat/1.png", "cat/2.png"])
    alter(tmp_path / "a.zip", size=2**29)
    source = open_evaluation(spec)
    with pytest.raises(OSError, match="unpacks to 536,870,912 bytes, at most 268,435,456 are read"):
        source[0]
    assert source[1].image == png(1)


def test_files_that_are_no_zip(tmp_path):
    with pytest.raises(UserError, match="no such zip file or folder: .*none.zip"):
        open_evaluation(f"zip:{tmp_path / 'none.zip'}")
    with pytest.raises(UserError, match="no zip file in"):
        open_evaluation(f"zip:{tmp_path}")
    spec = pack(tmp_path / "a.zip", ["cat/1.png"])
    archive_bytes = (tmp_path / "a.zip").read_bytes()
    for content in (b"", b"no zip", archive_bytes[: len(archive_bytes) // 2]):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(UserError, match="a.zip: no zip file, or a damaged one") as caught:
            open_evaluation(spec)
        assert "\n" not in str(caught.value)


def test_the_same_image_in_two_files(tmp_path):
    pack(tmp_path / "a.zip", ["train/cat/1.png"])
    pack(tmp_path / "b.zip", ["train/cat/1.png"])
    with pytest.raises(UserError, match="a.zip and b.zip both hold train/cat/1.png"):
        open_evaluation(f"zip:{tmp_path}")
