"""The subcommand search: an index that follows its folder, exact answers, and what is refused."""

import io
import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax import main as door
from mlip_jax.cli.command_line import parse
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import is_draft
from mlip_jax.search import neighbours, pictures, pieces, query, verb
from mlip_jax.search.collection import open_collection
from mlip_jax.search.identity import digest
from mlip_jax.search.index import Index

COUNT = 20


@pytest.fixture(scope="module")
def model(trained):
    return mlip_jax.load(trained)


@pytest.fixture
def photos(pairs, tmp_path):
    """20 images, some of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number in range(COUNT):
        place = folder / "below" if number % 3 == 0 else folder
        shutil.copy(pairs.parent / f"{number}.png", place / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image either")
    return folder


@pytest.fixture(scope="module")
def loaded():
    """`load`, whose models are compiled once."""
    models = {}

    def load(path, config):
        key = (str(path), schema.to_json(config))
        if key not in models:
            models[key] = mlip_jax.load(path, config=config)
        return models[key]

    return load


@pytest.fixture
def search(trained, tmp_path, loaded, monkeypatch):
    """Runs the subcommand on an index in a folder of its own; gives the exit code."""
    monkeypatch.setattr(verb, "load", loaded)
    index = tmp_path / "index"

    def run(*flags):
        return door.main(["mlip", "search", f"--workdir={trained}", f"--index={index}", *flags])

    run.index = index
    return run


def rows_of(folder):
    index = Index(folder)
    return {item.path: index.embeddings[row] for row, item in enumerate(index.items())}


def table(text):
    """The paths of a printed table, with their scores."""
    rows = re.findall(r"^ +(\d+) +(-?\d\.\d{4}) +(\S.*?) *$", text, re.M)
    assert [int(rank) for rank, *_ in rows] == list(range(1, len(rows) + 1))
    return [(path, float(score)) for _, score, path in rows]


def test_a_folder_is_indexed_and_found_by_words(search, photos, model, capsys):
    assert search(f"--images={photos}", "--text=picture 4", "--top=5") == 0
    out = capsys.readouterr().out
    assert f"{COUNT} images ({COUNT} new)" in out
    names = [*photos.glob("*.png"), *photos.glob("below/*.png")]
    paths = sorted(path for path in names if not path.name.startswith("."))
    scores = model.encode_image(paths) @ model.encode_text(["picture 4"])[0]
    best = np.argsort(-scores)[:5]
    hits = table(out)
    assert [path for path, _ in hits] == [str(paths[row]) for row in best]
    np.testing.assert_allclose([score for _, score in hits], scores[best], atol=1e-4)
    embeddings = np.load(search.index / "embeddings-0.npy", mmap_mode="r")
    assert embeddings.shape == (COUNT, model.config.model.embed_dim)


def test_an_index_alone_answers_and_finds_an_image_by_itself(search, photos, capsys):
    assert search(f"--images={photos}") == 0
    capsys.readouterr()
    assert search(f"--image={photos / 'below' / '3.png'}", "--top=3") == 0
    hits = table(capsys.readouterr().out)
    assert len(hits) == 3 and hits[0] == (str(photos / "below" / "3.png"), 1.0)


def test_the_index_of_a_run_lies_in_its_workdir(trained, photos, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    command = ["mlip", "search", f"--workdir={run}"]
    assert door.main([*command, "--text=x"]) == 2
    assert "--images=FOLDER" in capsys.readouterr().err
    assert door.main([*command, f"--images={photos}"]) == 0
    assert (run / "search" / "photos" / "index.json").is_file()
    assert door.main([*command, "--text=x"]) == 0
    (tmp_path / "more").mkdir()
    shutil.copy(photos / "1.png", tmp_path / "more")
    assert door.main([*command, f"--images={tmp_path / 'more'}"]) == 0
    assert door.main([*command, "--text=x"]) == 2
    assert "several indices" in capsys.readouterr().err


def test_a_set_is_indexed_by_its_spec(search, pairs, monkeypatch, capsys):
    monkeypatch.chdir(pairs.parent)
    assert search("--images=jsonl:pairs.jsonl") == 0
    assert "40 images (40 new)" in capsys.readouterr().out
    monkeypatch.chdir("/")
    assert search("--text=picture 1", "--top=2") == 0
    assert search(f"--images=jsonl:{pairs}") == 0
    assert "40 images (40 as before)" in capsys.readouterr().out


def test_new_changed_and_removed_images_are_noticed(search, photos, model, capsys):
    assert search(f"--images={photos}") == 0
    before = rows_of(search.index)
    (photos / "1.png").unlink()
    shutil.copy(photos / "2.png", photos / "new.png")
    Image.new("RGB", (30, 20), "red").save(photos / "4.png")
    capsys.readouterr()
    assert search(f"--images={photos}") == 0
    assert "(1 new, 1 changed, 18 as before, 1 removed)" in capsys.readouterr().out
    after = rows_of(search.index)
    assert list(after) == sorted(after) and "1.png" not in after
    np.testing.assert_allclose(after["4.png"], model.encode_image([photos / "4.png"])[0], atol=1e-6)
    for path in after.keys() & before.keys() - {"4.png"}:
        np.testing.assert_array_equal(after[path], before[path])
    assert len(list(search.index.glob("embeddings-*"))) == 1
    assert search(f"--images={photos}") == 0
    assert "20 images (20 as before)" in capsys.readouterr().out


def test_an_index_that_was_cut_short_goes_on(search, photos, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "PIECE", 8)
    save, saved = pieces.Pieces.save, []

    def cut_short(self, items, embeddings):
        if len(saved) == 1:
            (self._folder / ".000001.npy.1").write_bytes(b"half of it")
            (self._folder.parent / ".embeddings-0.npy.1").write_bytes(b"half of it")
            raise KeyboardInterrupt
        saved.append(items)
        return save(self, items, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(pieces.Pieces, "save", cut_short)
        assert search(f"--images={photos}") == 130
    assert search("--text=x") == 2 and "no index" in capsys.readouterr().err
    embedded = []
    encode = mlip_jax.inference.Model.encode_image_pixels
    monkeypatch.setattr(
        mlip_jax.inference.Model,
        "encode_image_pixels",
        lambda self, images: embedded.append(len(images)) or encode(self, images),
    )
    assert search(f"--images={photos}") == 0
    assert sum(embedded) == COUNT - 8
    assert not list(filter(is_draft, search.index.rglob("*")))
    whole_index = search.index.with_name("whole")
    assert search(f"--images={photos}", f"--index={whole_index}") == 0
    for name in ("embeddings-0.npy", "images-0.jsonl", "offsets-0.npy"):
        assert (whole_index / name).read_bytes() == (search.index / name).read_bytes()
    assert not list(search.index.glob("pieces-*"))


def test_unreadable_images_are_counted_and_listed(search, photos, capsys):
    (photos / "torn.png").write_bytes((photos / "1.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("<html>")
    (photos / "nowhere.png").symlink_to(photos / "gone.png")
    assert search(f"--images={photos}") == 0
    out = capsys.readouterr().out
    assert f"{COUNT} images ({COUNT} new, 3 unreadable)" in out
    assert "unreadable: text.jpg: " in out and "unreadable: nowhere.png: " in out
    listed = (search.index / "unreadable-0.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in listed} == {"torn.png", "text.jpg", "nowhere.png"}
    shutil.copy(photos / "2.png", photos / "torn.png")
    assert search(f"--images={photos}") == 0
    assert "21 images (1 new, 20 as before, 2 unreadable)" in capsys.readouterr().out
    assert search(f"--images={photos}", "--max-skipped-share=0.01") == 1
    assert re.search(r"2 of 23 images cannot be read.*text\.jpg|nowhere", capsys.readouterr().err)
    assert search("--text=x") == 0  # the index stays as it was


def test_a_folder_without_a_single_image_that_can_be_read(search, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    assert search(f"--images={folder}", "--max-skipped-share=1") == 1
    assert "none of 1 images can be read; the first is a.png" in capsys.readouterr().err


def test_names_of_any_bytes(search, photos, capsys):
    name = os.fsdecode(b"caf\xe9 [bold].png")
    shutil.copy(photos / "1.png", photos / name)
    assert search(f"--images={photos}") == 0
    assert search(f"--image={photos / name}", "--top=2") == 0
    assert "caf\ufffd [bold].png" in capsys.readouterr().out


def test_another_model_is_refused(search, photos, trained, tmp_path, capsys):
    assert search(f"--images={photos}") == 0
    capsys.readouterr()
    other = "--config.model.image.merging.rate=0.5"
    for flags in (["--text=x"], [f"--images={photos}"], ["--serve=0"]):
        assert search(*flags, other) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"another model, {trained} (step 8), than" in error


def test_an_export_is_the_same_model(search, photos, trained, model, tmp_path):
    assert search(f"--images={photos}") == 0
    out = tmp_path / "exported"
    assert door.main(["mlip", "export", f"--workdir={trained}", f"--out={out}"]) == 0
    assert digest(mlip_jax.load(out)) == digest(model) == Index(search.index).about.digest
    assert search(f"--workdir={out}", "--text=x") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "search needs something to do: --images=FOLDER"),
        (["--images=nowhere"], "--images=nowhere is no folder or dataset"),
        (["--images=emojy"], "did you mean 'emoji'"),
        (["--images=photo:x"], "no dataset is called photo"),
        (["--text=x"], "there is no index in"),
        (["--serve=http"], "--serve=http: expected a whole number from 0 to 65535"),
        (["--serve=70000"], "--serve=70000: expected a whole number"),
        (["--text=x", "--max-skipped-share=2"], "expected a share in [0, 1]"),
        (["--text=x", "--top=0"], "--top"),
        (["--text=x", "more"], "unexpected argument 'more'"),
        (["--text=x", "--out=y"], "--out goes with the subcommand"),
        (["--texts=x"], "did you mean 'text'"),
    ],
)
def test_mistakes_of_the_user(search, flags, message, capsys):
    assert search(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_mistakes_of_the_user(search, photos, tmp_path, capsys):
    def refused(message, *flags):
        assert search(*flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    refused("is a file, not a folder of images", f"--images={photos / '1.png'}")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("there are no images in", f"--images={empty}")
    assert not search.index.exists()  # nothing is left of what cannot begin
    search.index.mkdir()
    refused("there are no images in", f"--images={empty}")
    assert search.index.is_dir()  # but it was there before
    refused("holds other things, such as", f"--images={photos}", f"--index={photos}")
    assert search(f"--images={photos}") == 0
    refused(f"is of {photos}, not of {photos / 'below'}", f"--images={photos / 'below'}")
    refused("cannot read --image=", f"--image={tmp_path / 'no.png'}")
    refused("is no image that can be read", f"--image={photos / 'notes.txt'}")
    about = search.index / "index.json"
    about.write_text(about.read_text().replace('"count": 20', '"count": 21'))
    refused("is damaged (its files do not fit together): remove it", "--text=x")
    about.write_text("{}")
    refused("is no index of this version", "--text=x")
    about.write_text("{")
    refused("index.json: not JSON: ", "--text=x")


def test_a_question_that_cannot_be_asked_ends_it_before_anything_is_indexed(
    search, photos, model, monkeypatch, capsys
):
    def without_tokenizer(self, texts):
        raise UserError("no tokenizer")

    monkeypatch.setattr(type(model), "encode_text", without_tokenizer)
    assert search(f"--images={photos}", "--text=x") == 2
    assert capsys.readouterr().err == "error: no tokenizer\n"
    assert not search.index.exists()


def test_one_process_writes_at_a_time(search, photos, capsys):
    from mlip_jax.search.files import locked

    search.index.mkdir()
    with locked(search.index):
        assert search(f"--images={photos}") == 2
    assert "another process indexes in" in capsys.readouterr().err


def test_an_index_does_not_lead_out_of_its_folder(photos, tmp_path):
    (tmp_path / "secret.png").write_bytes((photos / "1.png").read_bytes())
    collection = open_collection(str(photos))
    for path in ("../secret.png", str(tmp_path / "secret.png"), "below/../../secret.png"):
        with pytest.raises(OSError, match="is not below"):
            collection.read(path)


def test_exact_search_is_a_sort(monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    query_vector = rng.normal(size=8).astype(np.float32)
    monkeypatch.setattr(query, "_ROWS", 64)
    for top in (1, 7, 100, 1000):
        best = query.best_rows(rows, query_vector, top)
        assert sorted(best) == sorted(np.argsort(-(rows @ query_vector))[:top])


def test_many_images_need_usearch(search, photos, monkeypatch, capsys):
    monkeypatch.setattr(neighbours, "EXACT", 10)
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    assert search(f"--images={photos}") == 2
    assert "pip install 'mlip_jax[ann]'" in capsys.readouterr().err


def test_usearch_finds_what_exact_search_finds(search, photos, monkeypatch, capsys):
    pytest.importorskip("usearch")
    assert search(f"--images={photos}", "--text=picture 2") == 0
    exact = table(capsys.readouterr().out)
    monkeypatch.setattr(neighbours, "EXACT", 10)
    many = search.index.with_name("many")
    assert search(f"--images={photos}", "--text=picture 2", f"--index={many}") == 0
    assert (many / "neighbours-0.usearch").is_file()
    assert table(capsys.readouterr().out) == exact
    (photos / "1.png").unlink()
    assert search(f"--images={photos}", "--text=picture 2", f"--index={many}") == 0
    assert not (many / "neighbours-0.usearch").exists()


def test_threads_read_one_index(search, photos):
    assert search(f"--images={photos}") == 0
    index = Index(search.index)
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.extend(map(index.path, range(COUNT))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(paths) == sorted([item.path for item in index.items()] * 4)
    with pytest.raises(IndexError):
        index.path(COUNT)


def test_heat_lies_on_what_the_patches_cover():
    alphas = [
        np.asarray(Image.open(io.BytesIO(pictures.heat(np.ones((4, 4), np.float32), seen))))[..., 3]
        for seen in (1.0, 0.75)
    ]
    assert alphas[0].all() and alphas[0].shape == (512, 512)
    assert alphas[1][:384, :384].all()
    assert not alphas[1][384:].any() and not alphas[1][:, 384:].any()


def test_serve_has_a_port_of_its_own():
    assert parse(["search", "--config=configs/clip.py", "--serve"]).options == {"serve": 8765}
    assert Path("configs/clip.py").is_file()
