"""Files that are written whole or not at all, and what is said of JSON that is none."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_jax.core import files
from mlip_jax.core.errors import UserError
from mlip_jax.core.history import read_history
from mlip_jax.data.prepare import card, output
from mlip_jax.data.prepare.readers import parse_object
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.regions.refer import open_refer
from mlip_jax.data.sets.kinds import Opening
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.sets.prepared import PreparedSource
from mlip_jax.data.sets.shards import Index, Shard, read_index
from mlip_jax.data.sets.splits import Choice, Wanted
from mlip_jax.data.text import hugging_face as hugging_face_tokenizers
from mlip_jax.data.text import wordpiece
from mlip_jax.evaluations import compare, prompts
from mlip_jax.evaluations.concepts.definitions import read_concept
from mlip_jax.evaluations.results import read_results
from mlip_jax.evaluations.verb import _read_draft
from mlip_jax.interop import artefact, bert, hugging_face, model_folders, open_clip, tensors
from mlip_jax.reports import report
from mlip_jax.search.index import Index as SearchIndex
from mlip_jax.storage import seal
from mlip_jax.training import attention_choice
from mlip_jax.training.metrics import cut_back

ROOT = Path(__file__).parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_texts_and_bytes_replace_a_file(tmp_path):
    path = tmp_path / "a"
    files.write_atomically(path, "caf\u00e9\n")
    assert path.read_bytes() == b"caf\xc3\xa9\n"
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, contents_at_sync = tmp_path / "a", []
    path.write_text("old")
    fsync = os.fsync

    def sync(descriptor):
        contents_at_sync.append((path.read_text(), os.pread(descriptor, 9, 0)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    files.write_atomically(path, "new")
    assert contents_at_sync == [("old", b"new")] and path.read_text() == "new"


def test_a_failure_leaves_what_was_there_and_no_draft(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomically(tmp_path / "nowhere/a", "text")
    assert caught.value.filename == str(tmp_path / "nowhere/a")  # not its draft
    assert names(tmp_path) == ["a", "folder"]


@pytest.mark.parametrize("whole", [files.whole_file, files.whole_folder])
def test_a_full_disk_names_the_file(tmp_path, whole):
    """A write that fails names none by itself."""
    with pytest.raises(OSError, match="No space") as caught, whole(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a") and names(tmp_path) == []


def test_a_draft_that_is_taken_away_changes_nothing(tmp_path):
    path = tmp_path / "a"
    with files.whole_file(path) as draft:
        draft.touch()
        draft.unlink()
    assert names(tmp_path) == []


def test_drafts_of_killed_processes_are_known_and_removed(tmp_path):
    code = (
        "import contextlib, os, sys\n"
        "from pathlib import Path\n"
        "from mlip_jax.core.files import whole_file, whole_folder\n"
        "folder = Path(sys.argv[1])\n"
        "with whole_file(folder / 'a.json') as file, whole_folder(folder / 'model') as made:\n"
        "    file.write_text('half')\n"
        "    (made / 'weights').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    kept_names = [".cache", ".lock", ".results.json.partial", "a.1", "a.json"]
    for name in kept_names:
        (tmp_path / name).write_text("kept")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert killed.wait() == -9
    drafts = [f".a.json.{killed.pid}", f".model.{killed.pid}"]
    assert [path.name for path in sorted(filter(files.is_draft, tmp_path.iterdir()))] == drafts
    files.remove_drafts(tmp_path)
    assert names(tmp_path) == kept_names and (tmp_path / "a.json").read_text() == "kept"
    files.remove_drafts(tmp_path / "nowhere")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "above" / "model"
    with files.whole_folder(target) as draft:
        (draft / "weights").write_text("all")
        assert not target.exists()
    assert names(target) == ["weights"] and names(target.parent) == ["model"]
    with pytest.raises(ZeroDivisionError), files.whole_folder(tmp_path / "other") as draft:
        (draft / "weights").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["above"]
    # Left by a killed process of the same number.
    (tmp_path / f".other.{os.getpid()}").mkdir()
    (tmp_path / f".other.{os.getpid()}/old").touch()
    with files.whole_folder(tmp_path / "other"):
        pass
    assert names(tmp_path) == ["above", "other"] and not names(tmp_path / "other")


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write .*/file/model: "):
        files.whole_folder(tmp_path / "file/model").__enter__()
    with (
        pytest.raises(UserError, match=r"^cannot write .*/taken: Directory not empty$"),
        files.whole_folder(tmp_path / "taken") as draft,
    ):
        (draft / "weights").touch()
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken/mine").touch()
    assert names(tmp_path) == ["file", "taken"] and names(tmp_path / "taken") == ["mine"]


WRONG = {
    "cut short": (b'{"a":\n  [1,', "not JSON: Expecting value, line 2, column 6"),
    "empty": (b"", "not JSON: Expecting value, line 1, column 1"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "half of a pair, encoded": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "deep": (b"[" * 200_000, "nested too deeply to be read"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "holds a whole number of too many digits"),
    "levels": (b'{"images": ' + b"[" * 150 + b"]" * 150 + b"}", "nested too deeply to be read"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
    "number": (b"3", "expected a JSON object, found a number"),
    "list": (b"[]", "expected a JSON object, found a list"),
    "null": (b"null", "expected a JSON object, found null"),
    "truth": (b"true", "expected a JSON object, found a truth value"),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_json_file_is_one_line(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path, advice="mend it")
    assert str(caught.value) == f"{path}: {reason}; mend it"
    with pytest.raises(UserError) as caught:
        files.read_json(path, missing={})
    assert str(caught.value) == f"{path}: {reason}"


def test_a_line_of_json_is_told_by_its_column():
    with pytest.raises(UserError, match=r"^f:7: not JSON: Expecting value, column 7$"):
        files.parse_json(b'{"a": }\n', "f:7")
    with pytest.raises(UserError, match="^f:7: expected a JSON object or list, found a text$"):
        files.parse_json('"x"', "f:7", (dict, list))
    with pytest.raises(files.NotJson, match="^not JSON: Expecting value, line 1, column 7$"):
        files.decode_json('{"a": }\n')


def test_a_missing_json_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "a.json", tmp_path / "file/a.json"):
        with pytest.raises(UserError, match=f"^cannot read {path}: N"):
            files.read_json(path)
        assert files.read_json(path, missing=None) is None
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}: Is a directory$"):
        files.read_json(tmp_path, missing=None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_that_is_right(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"name": "caf\u00e9", "half": "\\ud800", "none": NaN}', encoding=encoding)
    values = files.read_json(path)
    assert (values["name"], values["half"]) == ("caf\u00e9", "\ud800")
    assert math.isnan(values["none"])
    assert files.read_json(path, object, object_hook=len) == 3
    path.write_text("[1]", encoding=encoding)
    assert files.read_json(path, (dict, list)) == [1]


def prepared(folder):
    shard = Shard("train-00000", "train", 1, (0, 0), ("", ""), "", {})
    chosen = Choice("train", ("train",))
    index, opening = Index({}, (shard,)), Opening(Wanted("train"))
    return list(PreparedSource(folder, chosen, [shard], index, opening).captions())


def classes(folder):
    (folder / "cat").mkdir(exist_ok=True)
    (folder / "cat/1.jpg").touch()
    return open_source(f"folder:{folder}", "train")


def refer(folder):
    (folder / "instances.json").write_text("{}")
    return open_refer(folder)


def instances(folder):
    ref = {"ann_id": 1, "split": "val", "sentences": [{"sent": "a"}]}
    (folder / "refs.json").write_text(json.dumps([ref]))
    return open_refer(folder)


def coco(folder):
    (folder / "train2017").mkdir(exist_ok=True)
    return open_source(f"coco:{folder}", "train")


def vocabulary(folder):
    (folder / "merges.txt").touch()
    return hugging_face_tokenizers.read(folder)


def bert_vocabulary(folder):
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    return wordpiece.read(folder)


# What is read of a user's or a run's, and how: the file in a folder, and the call.
READERS = {
    "jsonl": ("a.jsonl", lambda f: open_source(f"jsonl:{f / 'a.jsonl'}", "train")),
    "regions": ("a.jsonl", lambda f: open_regions(f / "a.jsonl")),
    "refer": ("refs.json", refer),
    "refer's instances": ("instances.json", instances),
    "coco": ("annotations/captions_train2017.json", coco),
    "objects": ("a.json", lambda f: open_source(f"objects:{f / 'a.json'}", "train")),
    "karpathy": ("dataset_a.json", lambda f: open_source(f"karpathy:{f}/dataset_a.json", "train")),
    "classes": ("classes.json", classes),
    "named classes": ("named.json", lambda f: card.read_named(str(f / "named.json"))),
    "prepared": ("index.json", read_index),
    "prepared texts": ("train-00000.texts.jsonl", prepared),
    "broken records": ("broken.jsonl", card.read_broken),
    "BERT's vocabulary": ("tokenizer_config.json", bert_vocabulary),
    "tokenizer's settings": ("tokenizer_config.json", hugging_face_tokenizers.read),
    "CLIP's vocabulary": ("vocab.json", vocabulary),
    "Hugging Face": ("config.json", hugging_face.describe),
    "open_clip": ("open_clip_config.json", open_clip.describe),
    "BERT": ("config.json", bert.describe),
    "shards of weights": (
        "model.safetensors.index.json",
        lambda f: tensors.read(f, lambda name: False),
    ),
    "exported": ("mlip_config.json", artefact.read_settings),
    "workdir": ("config.json", model_folders.settings),
    "results": ("results.json", read_results),
    "environment": ("environment.json", report._environment),
    "attention": ("attention.json", attention_choice._kept),
    "search": ("index.json", SearchIndex),
    "concept": ("c.json", lambda f: read_concept(str(f / "c.json"))),
    "class names": (
        "names.json",
        lambda f: prompts.find_class_names(str(f / "names.json"), ("a",), "a set"),
    ),
    "compared": ("config.json", lambda f: compare.read_runs(with_results(f), "run")),
}


def with_results(folder):
    (folder / "results.json").write_text('{"retrieval/a/recall@1": 0.5}')
    return folder


@pytest.mark.parametrize(
    "content", ["cut short", "not UTF-8", "deep", "levels", "digits", "number", "twice"]
)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_file_that_is_wrong(tmp_path, reader, content):
    name, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(WRONG[content][0].replace(b"\n", b" "))
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    reason = re.match(r"not JSON|not UTF-8|nested|holds|expected|the key", WRONG[content][1])[0]
    assert reason in message


@pytest.mark.parametrize("content", WRONG)
def test_readers_that_go_on_pass_over_what_is_wrong(tmp_path, content):
    wrong = WRONG[content][0].replace(b"\n", b" ")
    (tmp_path / "file").write_bytes(wrong)
    assert _read_draft(tmp_path / "file", 3).step == 3
    (tmp_path / seal.NAME).write_bytes(wrong)
    assert str(tmp_path / seal.NAME) in seal.damage(tmp_path)
    (tmp_path / seal.NAME).unlink()
    good = b'{"step": 1, "samples": 8, "loss": 0.5}\n'
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(wrong + b"\n" + good)
    assert [line["step"] for line in read_history(log).training] == [1]
    cut_back(log, 5)
    assert log.read_bytes() == good
    if WRONG[content][1] != "not UTF-8":  # which it takes for other encodings
        with pytest.raises(ValueError, match="not JSON|digits|nested|found|twice"):
            parse_object(wrong)
    (tmp_path / ".prepare").mkdir()
    (tmp_path / ".prepare/train-00000.json").write_bytes(wrong)
    assert output.done_before(tmp_path, None) == {}


def test_depth_is_told_of_what_a_hook_makes_nothing_of():
    deep = '{"a": ' + "[" * 150 + "]" * 150 + "}"
    assert files.decode_json(deep, object, object_hook=lambda values: None) is None
    with pytest.raises(files.NotJson, match="nested too deeply"):
        files.decode_json(f"[{deep}]", object, object_hook=lambda values: tuple(values.values()))
