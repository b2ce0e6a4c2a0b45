"""classes.json beside class folders and zip files."""

import io
import json
import zipfile

import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.opening import open_evaluation, open_source

FOLDERS = ("n01", "n02")


@pytest.fixture(params=["folder", "split folders", "zip", "zip with it", "zips"])
def make(request, tmp_path):
    """Writes two classes with an image each and a classes.json; gives the spec and its path."""

    def write(classes, folders=FOLDERS):
        content = classes if isinstance(classes, (str, bytes)) else json.dumps(classes)
        content = content if isinstance(content, bytes) else content.encode()
        image = io.BytesIO()
        Image.new("L", (2, 2)).save(image, "PNG")
        above = "test/" if request.param == "split folders" else ""
        files = {f"{above}{name}/1.png": image.getvalue() for name in folders}
        if "zip" in request.param:
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                if request.param == "zip with it":
                    archive.writestr("classes.json", content)
                for name, data in files.items():
                    archive.writestr(name, data)
        else:
            files = {f"set/{name}": data for name, data in files.items()}
            for name, data in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(data)
        where, place = {
            "zip": ("zip:set.zip", "classes.json"),
            "zips": ("zip:", "classes.json"),
            "zip with it": ("zip:set.zip", "set.zip/classes.json"),
        }.get(request.param, ("folder:set", "set/classes.json"))
        if request.param != "zip with it":
            (tmp_path / place).write_bytes(content)
        kind, _, name = where.partition(":")
        return f"{kind}:{tmp_path / name}", str(tmp_path / place)

    return write


def test_names_of_folders(make):
    source = open_evaluation(make({"n02": " tabby  cat", "n03": "emu", "n01": "dog"})[0])
    assert source.class_names == ("tabby cat", "emu", "dog")
    assert [(source[i].label, source[i].captions) for i in range(2)] == [
        (0, ("tabby cat",)),
        (2, ("dog",)),
    ]


def test_order_of_classes(make):
    source = open_evaluation(make(["T-shirt/top", "n02", "n03", "big_n01"], ("n02", "big_n01"))[0])
    assert source.class_names == ("T-shirt/top", "n02", "n03", "big n01")
    assert [source[i].label for i in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"n01": "dog"}, "the class folder 'n02' is not in it; did you mean 'n01'"),
        (["n02"], "the class folder 'n01' is not in it"),
        ({"n01": "dog", "n02": 3}, "the class 'n02' must be a text, found 3"),
        (["n01", "n02", ""], "the class 2 must be a text, found ''"),
        (["n01", "n02", "n01"], "the class 'n01' is listed twice"),
        ('{"n01": "a", "n02": "b", "n01": "c"}', "the key 'n01' occurs twice"),
        ([], "expected a list of classes or an object"),
        ("3", "expected a list of classes or an object"),
        ("[1", "not JSON: Expecting ',' delimiter, line 1"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_wrong_content(make, classes, message):
    spec, place = make(classes)
    with pytest.raises(UserError, match=message) as caught:
        open_evaluation(spec)
    assert str(caught.value).startswith(f"{place}: ") and "\n" not in str(caught.value)


def test_classes_that_cannot_be_read(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    (tmp_path / "set/dog").mkdir(parents=True)
    (tmp_path / "x.png").rename(tmp_path / "set/dog/x.png")
    (tmp_path / "set/classes.json").mkdir()
    with pytest.raises(UserError, match="cannot read .*classes.json: Is a directory"):
        open_source(f"folder:{tmp_path / 'set'}", "train")


def test_an_empty_class_folder_stays_a_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "dog/x.png")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.class_names == ("cat", "dog") and source[0].label == 1 and len(source) == 1
