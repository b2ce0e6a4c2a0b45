"""Whatever the command line says, it is done, or one line says what is wrong and nothing is made.

By `-m slow`, 20,000 command lines are read, some go on into their subcommands, and a few are those
of processes of their own.
"""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from fuzzing import EXAMPLES, WORDS, meet, said

from mlip_jax import main as door
from mlip_jax.cli import flags, kinds
from mlip_jax.cli.subcommands import SUBCOMMANDS
from mlip_jax.core import schema

ROOT = Path(__file__).parents[1]
CONFIG = """
from mlip_jax.core import schema

def get_config(arg=None):
    values = schema.arguments(arg, seed="3")
    config = schema.default()
    config.name = "tried"
    config.seed = schema.whole_number("seed", values["seed"])
    return config
"""
KEYS = schema.flatten(schema.default().to_dict())
VALUES = (
    *("", "0", "-1", "1", "2", "0.5", "1e3", "1e400", "nan", "inf", "1_000", "0x10", "١", "9" * 40),
    *("true", "False", "none", "None", "()", "(1,", "[1,2]", "('a',)", "{}", "auto", "all", ",,"),
    *("a,b", "a:b", "mlip", "tried.py", "tried.py:seed=x", "tried.py:", ":", "runs/x", ".", ".."),
    *("/proc/x", "/dev/null", "x" * 300, "jsonl:a", "mix:a*1", "folder:.", "gs://", "s3://a/b"),
    *("cpu:8", "v5e:4x4", "cpu:0", "h100:4x8", "data:8", "data:-1,fsdp:0", "data:1,data:2"),
    *("image=a,caption=b", "image", "host:1", "host:99999", "a/{b,{c,d}}", "{", "$(x)", "'x"),
    *("os.system('x')", "__import__('os')", "lambda: 1", "1 if 1 else 2", "-", "--", "=", "%s"),
)


def argument(odd):
    """A text that an argument can be: without NUL, and with halves of characters from bytes."""
    kind = odd.randrange(4)
    text = odd.choice(VALUES) if kind else odd.text()
    if kind == 1:
        text += odd.choice(WORDS)
    return os.fsdecode(text.replace("\0", "").encode("utf-8", "surrogatepass"))


def command(odd):
    """A command line: usual parts, and odd ones among them."""
    name = odd.choice(list(SUBCOMMANDS))
    words = [] if odd.once_in(9) else [argument(odd) if odd.once_in(30) else name]
    if odd.once_in(2) and name != "prepare":
        words.append("--config=tried.py")
    taken = flags.taken_by(name)
    for _ in range(odd.randint(0, 4)):
        kind = odd.randrange(10)
        if kind < 5:
            flag = odd.choice(taken if odd.randrange(9) else flags.FLAGS)
            use = next(iter(flag.uses.values()))
            value = argument(odd)
            if isinstance(use.kind, kinds.Choice | kinds.Registered) and odd.once_in(2):
                value = odd.choice(list(use.kind.choices))
            words += odd.choice(([f"--{flag.name}={value}"], [f"--{flag.name}", value]))
            if flag.bare and odd.once_in(2):
                words[-1] = f"--{flag.name}"
        elif kind < 9:
            key = odd.choice(list(KEYS)) if odd.randrange(9) else argument(odd)
            value = argument(odd)
            if odd.once_in(3) and key in KEYS:
                value = str(odd.like(KEYS[key]) if KEYS[key] != () else value)
            words.append(f"--{odd.choice(('', '', '', 'no'))}config.{key}={value}")
        else:
            words.append(argument(odd))
    if odd.once_in(9):
        odd.shuffle(words)
    return [word.replace("\0", "") for word in words]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, with a config file; nothing else is in it afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("tried.py").write_text(CONFIG)
    environment = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)


def ends_well(code, out, err, words):
    """That a command was done, or that one line says why not."""
    assert code in (0, 1, 2), code
    if code == 0:
        return
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err[-3000:]
    said(lines[0].encode("utf-8", "backslashreplace").decode())
    # A config file's own error is told by its place and its type.
    line = re.sub(r", line \d+: SyntaxError: ", "", lines[0])
    assert "Error:" not in line and " object at 0x" not in line, line


@EXAMPLES
def test_command_lines(place, examples, monkeypatch, capsys):
    for one in SUBCOMMANDS.values():
        room = types.ModuleType(one.module)
        setattr(room, one.function, lambda *_, **__: 0)
        monkeypatch.setitem(sys.modules, one.module, room)
    names = sorted(os.listdir())

    def check(words):
        code = door.main(["mlip", *words])
        ends_well(code, *capsys.readouterr(), words)
        assert sorted(os.listdir()) == names

    meet("command lines", command, check, examples)


def strangers_folder(odd):
    """A command that looks at a folder of somebody's: its words, and the folder's files."""
    name = odd.choice(("evaluate", "report", "export", "search", "plan", "prepare"))
    files = {}
    config = {**schema.default().to_dict(), "name": "tried"}
    config["data"]["train"] = "jsonl:none.jsonl"
    if odd.randrange(6):
        files["config.json"] = odd.changed(config, 1, ("bert", "resnet", "x", -1))
    for file in ("results.json", "environment.json", "metrics.jsonl", "start.json", ".lock"):
        if odd.once_in(4):
            files[file] = odd.changed({"step": 1, "samples": 8, "loss": 0.5, "a/b/c": 1}, 2)
    if odd.once_in(6):
        files[odd.choice(("mlip_config.json", "open_clip_config.json"))] = odd.changed(config, 2)
    folders = [path for path in ("checkpoints/²", "checkpoints/3", "report") if odd.once_in(5)]
    words = {
        "evaluate": ["--workdir=a"],
        "report": ["--workdir=a"],
        "export": ["--workdir=a", "--out=b"],
        "search": ["--workdir=a", f"--images={odd.choice(('a', 'none', 'jsonl:none'))}"],
        "plan": ["--workdir=a", f"--topology=x{argument(odd)}"],
        "prepare": [f"--source={argument(odd)}", "--out=b", "--workers=1"],
    }
    return [name, *words[name]], files, folders


@EXAMPLES
def test_folders_of_strangers(place, examples, capsys):
    def check(example):
        words, files, folders = example
        Path("a").mkdir()
        for name in folders:
            Path("a", name).mkdir(parents=True)
        for name, text in files.items():
            Path("a", name).write_text(text)
        code = door.main(["mlip", *words])
        ends_well(code, *capsys.readouterr(), words)
        assert code, "there is nothing to be done"
        left = {path for path in os.listdir() if path not in ("a", "tried.py")}
        assert not left, left
        shutil.rmtree("a")

    meet("folders of strangers", strangers_folder, check, min(examples, 2000) // 10)


PROCESSES = [
    ["--config=mlip", "--config.name=\udcff\udcfe", "--config.batch_size=١"],
    ["evaluate", "--workdir=/proc/x"],
    ["train", "--config=mlip", "--workdir=/dev/null/x"],
    ["--config=mlip:size=²", "--workdir=runs/x"],
    ["export", "--workdir=a\nb", "--out=b"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", PROCESSES, ids=range(len(PROCESSES)))
def test_processes(place, words):
    command = [sys.executable, "-m", "mlip_jax", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    ends_well(done.returncode, "", done.stderr.decode("utf-8", "replace"), words)
    assert done.returncode == 2
    assert os.listdir() == ["tried.py"]
