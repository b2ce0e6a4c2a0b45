"""The config of a run that is looked at from another folder."""

import json

import pytest

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.trained import read_config


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run that was trained in "home", where a.jsonl lies; b.jsonl lies here."""
    for folder in ("run", "home/sets", "here"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/sets/a.jsonl").touch()
    (tmp_path / "here/b.jsonl").touch()
    (tmp_path / "run/environment.json").write_text(json.dumps({"folder": str(tmp_path / "home")}))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("jsonl:sets/a.jsonl", "jsonl:HOME/sets/a.jsonl"),
        ("jsonl:sets/a.jsonl#val", "jsonl:HOME/sets/a.jsonl#val"),
        ("jsonl:b.jsonl", "jsonl:b.jsonl"),
        ("jsonl:b.jsonl#val", "jsonl:b.jsonl#val"),
        ("folder:nowhere", "folder:HOME/nowhere"),
        ("regions:sets/a.jsonl", "regions:HOME/sets/a.jsonl"),
        ("folder:/abs/olute", "folder:/abs/olute"),
        ("folder:~/pets", "folder:~/pets"),
        ("emoji", "emoji"),
        ("coco#val", "coco#val"),
        ("tfds:sets", "tfds:sets"),
        ("mix:coco*0.7+jsonl:sets/a.jsonl*0.3", "mix:coco*0.7+jsonl:HOME/sets/a.jsonl*0.3"),
        (
            "mix:jsonl:sets/a.jsonl*1+jsonl:b.jsonl*2",
            "mix:jsonl:HOME/sets/a.jsonl*1+jsonl:b.jsonl*2",
        ),
        ("sets/names.json", "HOME/sets/names.json"),
    ],
)
def test_relative_paths_count_from_where_it_was_trained(workdir, spec, expected):
    config = schema.default()
    config.data.train = spec
    config.evaluation.grounding = ("compositions", spec)
    (workdir / "config.json").write_text(schema.to_json(config))
    expected = expected.replace("HOME", str(workdir.parent / "home"))
    read = read_config(workdir)
    assert (read.data.train, read.evaluation.grounding) == (expected, ("compositions", expected))
    config.data.train, config.evaluation.grounding = expected, ("compositions", expected)
    assert schema.to_json(read) == schema.to_json(config)  # and nothing else has changed
    # Runs of earlier versions do not say where they were trained.
    (workdir / "environment.json").write_text("{}")
    assert read_config(workdir).data.train == spec
    (workdir / "environment.json").write_text("{")
    with pytest.raises(UserError, match="environment.json: "):
        read_config(workdir)
