"""The front door: what it understands, what it refuses and how it ends."""

import errno
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mlip_jax import config as schema
from mlip_jax import main as door
from mlip_jax import versions
from mlip_jax.config import RunError

CONFIG = """
from mlip_jax import config as schema

def get_config(arg=None):
    values = schema.arguments(arg, seed="3")
    config = schema.default()
    config.name = "tried"
    config.seed = int(values["seed"])
    return config
"""


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for the rooms; runs in an empty folder with a config file."""
    found = []

    def verb(name, code=0):
        def act(config, workdir):
            found.append((name, config, workdir))
            return code

        return act

    rooms = {
        "mlip_jax.training.verb": {"train": verb("train", 75)},
        "mlip_jax.evaluations": {"evaluate_workdir": verb("evaluate")},
        "mlip_jax.reports": {"report_workdir": verb("report")},
    }
    for name, functions in rooms.items():
        room = types.ModuleType(name)
        vars(room).update(functions)
        monkeypatch.setitem(sys.modules, name, room)
    monkeypatch.chdir(tmp_path)
    Path("tried.py").write_text(CONFIG)
    return found


def main(*arguments):
    return door.main(["mlip", *arguments])


def test_trains_by_default_and_hands_on_the_exit_code(calls):
    assert main("--config=tried.py", "--config.batch_size=64", "--config.mesh.data", "-1") == 75
    name, config, workdir = calls.pop()
    assert (name, workdir) == ("train", Path("runs/tried"))
    assert (config.seed, config.batch_size) == (3, 64)
    assert config.is_locked


@pytest.mark.parametrize(
    ("version", "named"), [("0.8.3", True), ("0.9.0", False), ("0.12.9", False), ("0.13.0", True)]
)
def test_an_unexpected_error_names_the_versions_that_were_tested(
    calls, monkeypatch, version, named
):
    def fails(config, workdir):
        raise AttributeError("module 'jax' has no attribute 'gone'")

    monkeypatch.setattr(sys.modules["mlip_jax.training.verb"], "train", fails)
    monkeypatch.setattr(versions, "installed", lambda: {"jax": version})
    with pytest.raises(AttributeError, match="gone") as caught:
        main("--config=tried.py")
    first, last = versions.TESTED_JAX
    note = f"mlip_jax was tested with jax {first} to {last}; installed is jax {version}"
    assert getattr(caught.value, "__notes__", []) == [note] * named


def test_arguments_of_the_config_file_and_overrides_of_every_type(calls):
    overrides = {
        "seed": "9",
        "optimizer.learning_rate": "1",
        "data.augment.flip": "true",
        "data.augment.crop": "(0.5, 1)",
        "evaluation.retrieval": "('validation', 'folder:x')",
        "data.train": "jsonl:pairs.jsonl",
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    main("train", "--config=tried.py:seed=5", "--workdir=here", *flags)
    _, config, workdir = calls.pop()
    assert workdir == Path("here")
    assert (config.seed, config.optimizer.learning_rate) == (9, 1.0)
    assert config.data.augment.flip is True and config.data.augment.crop == (0.5, 1)
    assert config.evaluation.retrieval == ("validation", "folder:x")
    assert config.data.train == "jsonl:pairs.jsonl"
    main("--config=tried.py:seed=5", "--noconfig.data.augment.flip")
    assert calls.pop()[1].seed == 5


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_a_workdir_brings_its_own_config(calls, verb):
    config = schema.default()
    config.seed = 11
    Path("run").mkdir()
    Path("run/config.json").write_text(schema.to_json(config))
    assert main(verb, "--workdir=run", "--config.batch_size=32") == 0
    name, config, workdir = calls.pop()
    assert (name, workdir, config.seed, config.batch_size) == (verb, Path("run"), 11, 32)
    assert main(verb, "--config=tried.py") == 0
    assert calls.pop()[2] == Path("runs/tried")


USAGE = [
    ("", "no config: .* --config=mlip"),
    ("trian --config=tried.py", "unknown verb 'trian'.* did you mean 'train'"),
    ("--conifg=tried.py", "unknown flag --conifg; did you mean 'config'"),
    ("--config=tried.py --workdri=x", "unknown flag --workdri; did you mean 'workdir'"),
    ("--config=tried.py --workdir", "Missing value for flag --workdir"),
    ("--config=tried.py train", "unexpected argument 'train': a verb comes first"),
    ("--config=tired.py", "no config file tired.py; packaged: .*, mlip, .*did you mean 'tried.py'"),
    ("--config=miip", "no config file miip; .*did you mean 'mlip'"),
    ("--config=configs/mlip.py", "the package has one of that name: --config=mlip"),
    ("--config=tried.py:sead=1", "tried.py:sead=1: .*did you mean 'seed'"),
    ("--config=tried.py --config.batchsize=1", "config.batchsize; did you mean 'batch_size'"),
    (
        "--config=tried.py --config.model.image.merging.rat=1",
        "config.model.image.merging.rat; did you mean 'model.image.merging.rate'",
    ),
    ("--config=tried.py --config.rate=1", "did you mean 'model.image.merging.rate'"),
    ("--config=tried.py --config.mesh=1", "config.mesh is a section.*config.mesh.data"),
    ("--config=tried.py --config.batch_size=x", "config.batch_size='x': .* type int"),
    ("--config=tried.py --config.batch_size=0.5", "config.batch_size='0.5': .* type int"),
    ("--config=tried.py --config.data.augment.flip=so", "flip='so': .* type bool"),
    ("--config=tried.py --config.data.augment.crop=wide", "crop=.*wide.* tuple of float"),
    ("--config=tried.py --config.batch_size=1", r"at least 2 \(a contrastive loss compares pairs"),
    ("evaluate", "evaluate needs a run to look at"),
    ("evaluate --workdir=.", "no workdir of a run: it has no config.json"),
    ("report --workdir=tried.py", "no workdir of a run"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_a_mistake_is_one_line_and_exit_2(calls, capsys, arguments, message):
    assert main(*arguments.split()) == 2
    assert not calls
    assert_one_line(capsys, message)


def assert_one_line(capsys, message):
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


FILES = [
    ("def get_config():\n    return 1 / 0\n", "bad.py, line 2: ZeroDivisionError"),
    ("def get_config(:\n", "bad.py, line 1: SyntaxError"),
    ("import no_such_module\n", "bad.py, line 1: ModuleNotFoundError"),
    ("", "bad.py: it defines no function get_config"),
    (CONFIG.replace('"tried"', "3"), "bad.py, line 7: TypeError"),
    (CONFIG.replace("config.name", "config.bach_size"), "did you mean 'batch_size'"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_mistake_in_a_config_file_is_named(calls, capsys, text, message):
    Path("bad.py").write_text(text)
    assert main("--config=bad.py") == 2
    assert_one_line(capsys, message)


def test_a_damaged_workdir_config_is_named(calls, capsys):
    Path("config.json").write_text("{")
    assert main("evaluate", "--workdir=.") == 2
    assert_one_line(capsys, "config.json is damaged")


ENDS = [
    (RunError("the loss is NaN\nat step 3"), 1, "the loss is NaN at step 3"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "events"), 1, "no space left.* events"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS)
def test_what_ends_a_run_is_one_line(calls, capsys, monkeypatch, error, code, message):
    def train(config, workdir):
        raise error

    monkeypatch.setattr(sys.modules["mlip_jax.training.verb"], "train", train)
    assert main("--config=tried.py") == code
    assert_one_line(capsys, message)


def test_what_nobody_foresaw_keeps_its_traceback(calls, monkeypatch):
    def train(config, workdir):
        raise PermissionError("odd")

    monkeypatch.setattr(sys.modules["mlip_jax.training.verb"], "train", train)
    with pytest.raises(PermissionError):
        main("--config=tried.py")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["report", "--help"]])
def test_help_names_every_verb_and_flag(calls, capsys, arguments):
    assert main(*arguments) == 0
    page = capsys.readouterr().out
    for word in (*door.VERBS, "--config", "--workdir", "--config.KEY=VALUE", "configs/mlip.py"):
        assert word in page


def test_every_verb_has_its_room():
    for module, function in door.VERBS.values():
        assert callable(getattr(importlib.import_module(module), function))


def test_starts_without_jax_and_ends_by_the_exit_code():
    """Processes that load data import the main program: it must not bring JAX with it."""
    code = (
        "import sys, mlip_jax.main\n"
        "assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.argv[1:] = ['nonsense']\n"
        "mlip_jax.main.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unknown verb"), done.stderr
