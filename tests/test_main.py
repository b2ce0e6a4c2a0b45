"""The front door: what it understands, what it refuses and how it ends."""

import errno
import importlib
import inspect
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mlip_jax
from mlip_jax import main as door
from mlip_jax.benchmark import peers
from mlip_jax.cli import command_line, flags, kinds
from mlip_jax.cli.subcommands import SUBCOMMANDS
from mlip_jax.core import schema, versions
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.registry import EXPORT_FORMATS

CONFIG = """
from mlip_jax.core import schema

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
    recorded = []

    def verb(name, code=0):
        def act(config, workdir):
            recorded.append((name, config, workdir))
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
    return recorded


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
    ("trian --config=tried.py", "unknown subcommand 'trian'.* did you mean 'train'"),
    ("--conifg=tried.py", "unknown flag --conifg; did you mean 'config'"),
    ("--config=tried.py --workdri=x", "unknown flag --workdri; did you mean 'workdir'"),
    ("--config=tried.py --workdir", "Missing value for flag --workdir"),
    ("--config=tried.py train", "unexpected argument 'train': the subcommand comes first"),
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
    ("--config=tried.py --lr=1", r"--lr; did you mean --config\.optimizer\.learning_rate=VALUE\?"),
    ("--config=tried.py --batch_size=8", r"did you mean --config\.batch_size=VALUE\?"),
    ("--config=tried.py --batch-size=8", r"did you mean --config\.batch_size=VALUE\?"),
    ("--config=tried.py --learning-rat=1", r"mean --config\.optimizer\.learning_rate=VALUE\?"),
    ("--config=tried.py --steps=8", r"goes with .* benchmark, .* mean --config\.samples=VALUE\?"),
    ("--config=tried.py --config.lr=1", "config.lr; did you mean 'optimizer.learning_rate'"),
    ("--config=tried.py --config.optimizer.lr=1", "did you mean 'optimizer.learning_rate'"),
    ("--config=tried.py --xyzzy=1", r"unknown flag --xyzzy$"),
    ("prepare --out=x --lr=1", r"unknown flag --lr$"),
    ("--config=tried.py --config.mesh=1", "config.mesh is a section.*config.mesh.data"),
    ("--config=tried.py --config.batch_size=x", "config.batch_size='x': .* type int"),
    ("--config=tried.py --config.batch_size=0.5", "config.batch_size='0.5': .* type int"),
    ("--config=tried.py --config.data.augment.flip=so", "flip='so': .* type bool"),
    ("--config=tried.py --config.data.augment.crop=wide", "crop=.*wide.* tuple of float"),
    ("--config=tried.py --config.batch_size=1", r"at least 2 \(a contrastive loss compares pairs"),
    ("--config=tried.py --noconfig.data.augment.flip=1", "flip=1 does not take an argument"),
    ("evaluate", "evaluate needs a run to look at"),
    ("help trian", "unknown subcommand 'trian'.* did you mean 'train'"),
    ("prepare --out=x --chek", "unknown flag --chek; did you mean 'check'"),
    ("prepare --out=x y", "prepare takes no 'y'"),
    ("prepare --out=x --config.seed=1", "prepare takes no '--config.seed=1'"),
    ("prepare --out=x --workers=0", "--workers=0: expected a whole number from 1 to 1024"),
    ("prepare --out=x --workers=100000", "expected a whole number from 1 to 1024"),
    ("--config=tried.py --coordinator=localhost:99999", "coordinator=localhost:99999: expected h"),
    ("--config=tried.py --config.seed=99999999999999999999", "config.seed has a value of more"),
    ("--config=tried.py --config.optimizer.weight_decay=inf", "weight_decay=inf must be finite"),
    ("--config=tried.py --config.name=", "config.name='' must be a name"),
    ("--config=tried.py --config.evaluation.probe.shots=0.5", "shots=.*0.5.*tuple of int"),
    ("benchmark --config=tried.py --compare=", "--compare=: expected"),
    ("prepare --out=x --workers=x", "--workers=x: expected a whole number from 1 to 1024"),
    ("prepare", "prepare needs a folder to write to: add --out=DIR"),
    ("export --workdir=x", "export needs a folder to write: add --out=DIR"),
    ("export --format=", "--format=: expected mlip, hf_clip, .* or onnx"),
    ("evaluate --rates=,", r"--rates=,: expected shares in \[0, 0.95\] with commas between"),
    ("evaluate --rates=0.5,nan", "--rates=0.5,nan: expected shares"),
    ("evaluate --compare=,", "--compare=,: expected workdirs"),
    ("evaluate --compare=a,b c", "--compare takes no 'c'"),
    ("evaluate --compare=a,b --process-id=0", "takes no --process-id"),
    ("benchmark --config=tried.py --compare='x", "--compare='x: No closing quotation"),
    ("evaluate --workdir=.", "no workdir of a run: it has no config.json"),
    ("report --workdir=tried.py", "cannot use tried.py as --workdir: it is no folder"),
    (f"evaluate --workdir={'x' * 300}", "cannot use x+ as --workdir: File name too long"),
    (f"--config=tried.py --workdir={'x' * 300}", "cannot use x+ as --workdir: File name too long"),
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
    assert_one_line(capsys, "config.json: not JSON")


ENDS = [
    (RunError("the loss is NaN\nat step 3"), 1, "the loss is NaN at step 3"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "events"), 1, "no space left.* events"),
    (OSError(errno.EFBIG, "File too large"), 1, "cannot use a file: File too large"),
    (OSError(errno.EROFS, "Read-only file system", "runs/a"), 1, "cannot use runs/a: Read-only"),
    (FileExistsError(errno.EEXIST, "File exists", "a/report"), 1, "cannot use a/report: File exi"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS)
def test_what_ends_a_run_is_one_line(calls, capsys, monkeypatch, error, code, message):
    def train(config, workdir):
        raise error

    monkeypatch.setattr(sys.modules["mlip_jax.training.verb"], "train", train)
    assert main("--config=tried.py") == code
    assert_one_line(capsys, message)


def test_a_message_is_one_printable_line_and_no_essay():
    text = "a\n\ud83d\u2028b\t" + "x" * 100_000 + " mend it"
    for error in (UserError(text), RunError(text), pickle.loads(pickle.dumps(UserError(text)))):
        line = str(error)
        assert line.startswith(r"a \ud83d b xxx") and line.endswith("xxx mend it")
        assert " ... " in line and len(line) < 1600
        assert error.args == (text,)


def test_what_nobody_foresaw_keeps_its_traceback(calls, monkeypatch):
    def train(config, workdir):
        raise PermissionError("odd")

    monkeypatch.setattr(sys.modules["mlip_jax.training.verb"], "train", train)
    with pytest.raises(PermissionError):
        main("--config=tried.py")


USES = [(flag, name) for flag in flags.FLAGS for name in flag.uses]
IDS = [f"{name}-{flag.name}" for flag, name in USES]
WRONG = {
    kinds.Text: [""],
    kinds.Whole: ["", "x", "1.5", "-1", "99999999999999999999999999x"],
    kinds.Address: ["", "host", "host:", ":1", "host:0", "host:99999", "a b:1"],
    kinds.Share: ["", "x", "-0.1", "1.1", "nan"],
    kinds.Shares: ["", ",", "0.5,", "0.5,x", "0.99"],
    kinds.Choice: ["", "nonsense"],
    kinds.Registered: [""],
    kinds.Switch: ["", "maybe"],
}


@pytest.mark.parametrize(("flag", "name"), USES, ids=IDS)
def test_a_wrong_value_is_one_line_that_names_the_flag(calls, capsys, flag, name):
    kind = flag.uses[name].kind
    for value in WRONG[type(kind)]:
        assert main(name, f"--{flag.name}={value}") == 2
        written = re.escape(f"--{flag.name}={value}: expected ")
        assert_one_line(capsys, f"^error: {written}.*{re.escape(kind.expected)}")
    assert not calls


def test_numbers_have_bounds():
    assert kinds.Whole(2, 3).read("2") == 2 and kinds.Whole(2).read("9") == 9
    for kind, text in ((kinds.Whole(2, 3), "1"), (kinds.Whole(2, 3), "4"), (kinds.Whole(2), "1")):
        with pytest.raises(ValueError):
            kind.read(text)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_a_flag_of_another_subcommand_is_one_line(calls, capsys, name):
    others = [flag for flag in flags.FLAGS if name not in flag.uses]
    assert others
    for flag in others:
        assert main(name, f"--{flag.name}={flag.bare or 1}") == 2
        message = f"--{flag.name} goes with the subcommands? {next(iter(flag.uses))}.* not with"
        assert_one_line(capsys, message)
    assert not calls


def page(capsys, *arguments):
    assert main(*arguments) == 0
    out, err = capsys.readouterr()
    assert not err and max(map(len, out.splitlines())) <= 80
    return out


def flags_of(text):
    """The flags that a page lists, each at the beginning of its line."""
    return re.findall(r"^  (?:-h, )?--([a-z-]+)(?=[\[=\s])", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["help", "--config=x.py"]])
def test_the_overview_names_every_subcommand_and_the_common_flags(calls, capsys, arguments):
    text = page(capsys, *arguments)
    for name, subcommand in SUBCOMMANDS.items():
        assert re.search(f"^  {name} +{re.escape(subcommand.summary)}$", text, re.MULTILINE)
    assert flags_of(text) == ["config", "workdir", "help", "version"]
    assert "--config.KEY=VALUE" in text and "--config=mlip" in text
    assert not calls


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_page_of_a_subcommand_names_its_flags_and_no_others(calls, capsys, name):
    text = page(capsys, name, "--help")
    assert flags_of(text) == [flag.name for flag in flags.FLAGS if name in flag.uses]
    assert ("--config.KEY=VALUE" in text) == (name != "study")
    unwrapped = " ".join(text.split())
    for flag in flags.FLAGS:
        if name in flag.uses:
            assert " ".join(flag.uses[name].help.split()) in unwrapped
            assert all(choice in unwrapped for choice in flag.uses[name].kind.choices)
            assert flag.variable in unwrapped
    for arguments in ([name, "-h"], ["help", name], ["--help", name], [name, "--seed=1", "--help"]):
        assert page(capsys, *arguments) == text
    assert not calls


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_usage_and_examples_use_flags_that_there_are(name):
    for way in SUBCOMMANDS[name].usage:
        for used in re.findall(r"--([a-z-]+)(?!\.)\b", way.replace("--config.KEY", "")):
            assert flags.takes(name, used)
    for example in SUBCOMMANDS[name].examples:
        program, used, *words = shlex.split(example.replace("\\\n", ""))
        assert program == "mlip"
        values = flags.define()
        unparsed = values(["mlip", *flags.complete(words)], known_only=True)[1:]
        assert flags.options(used, values)
        config_flags = {f"--config.{key}" for key in schema.flatten(schema.default().to_dict())}
        assert {word.partition("=")[0] for word in unparsed} <= config_flags


def parameters(name):
    """Those of the subcommand's function after config and workdir."""
    subcommand = SUBCOMMANDS[name]
    act = getattr(importlib.import_module(subcommand.module), subcommand.function)
    signature = inspect.signature(act).parameters
    assert list(signature)[:2] == ["config", "workdir"]
    return {key: each for key, each in signature.items() if key not in ("config", "workdir")}


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_flag_is_a_parameter_of_the_subcommand_and_the_other_way_round(name):
    subcommand_flags = {flag.keyword: flag for flag in flags.FLAGS if name in flag.uses}
    for keyword in ("config", "workdir", "from", "import", "help", "version"):
        subcommand_flags.pop(keyword, None)
    keyword_flags = {
        keyword: flag for keyword, flag in subcommand_flags.items() if not flag.variable
    }
    expected = parameters(name)
    if name == "benchmark":
        expected.pop("title")  # the command line's, from the config's name
    assert set(keyword_flags) == set(expected)
    for keyword, flag in keyword_flags.items():
        use, default = flag.uses[name], expected[keyword].default
        assert bool(use.missing) == (default is inspect.Parameter.empty)
        if use.default is not None:
            assert use.default == default
            assert use.kind.read(str(default)) == default


def test_no_flag_is_defined_twice():
    names = [flag.name for flag in flags.FLAGS]
    assert len(set(names)) == len(names)
    assert all(flag.uses and set(flag.uses) <= set(SUBCOMMANDS) for flag in flags.FLAGS)


def test_flags_name_what_the_subcommands_know():
    choices = {flag.name: use.kind.choices for flag in flags.FLAGS for use in flag.uses.values()}
    assert tuple(choices["against"]) == peers.PEERS
    variables = {flag.name: flag.variable for flag in flags.FLAGS if flag.variable}
    assert variables == schema.PROCESS_VARIABLES


def test_a_registered_format_is_a_value_of_the_flag(calls, capsys):
    EXPORT_FORMATS.register("mine", lambda folder, model: ())
    try:
        assert "onnx, mine (default: mlip)" in " ".join(page(capsys, "export", "--help").split())
        export = ["export", "--config=tried.py", "--out=o", "--format=mine"]
        assert command_line.parse(export).options == {"out": "o", "format": "mine"}
    finally:
        EXPORT_FORMATS.unregister("mine")


def test_values_arrive_with_their_types(calls):
    options = command_line.parse(
        ["prepare", "--out=o", "--resize=256", "--shard-records", "7", "--workers=1", "--workers=2"]
        + ["--max-skipped-share=.5", "--check"]
    ).options
    assert options == {
        "out": "o",
        "resize": 256,
        "shard_records": 7,
        "workers": 2,
        "max_skipped_share": 0.5,
        "check": True,
    }
    evaluate = ["evaluate", "--config=tried.py", "--rates=0,0.5", "--process-id=1"]
    command = command_line.parse([*evaluate, "--processes=2", "--coordinator=host:1"])
    assert command.options == {"rates": (0.0, 0.5)}
    assert command.environment == {
        "MLIP_COORDINATOR": "host:1",
        "MLIP_PROCESSES": "2",
        "MLIP_PROCESS_ID": "1",
    }
    search = ["search", "--config=tried.py"]
    assert command_line.parse([*search, "--serve"]).options == {"serve": 8765}
    assert command_line.parse([*search, "--serve=0", "--top=3"]).options == {"serve": 0, "top": 3}
    plan = ["plan", "--config=tried.py", "--topology=cpu:8", "--largest-batch=false"]
    assert command_line.parse(plan).options == {"topology": "cpu:8", "largest_batch": False}
    compare = ["evaluate", "--compare=a,b", "--compare=c"]
    assert command_line.parse(compare).options == {"compare": ("a", "b", "c")}


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version", "--help"]])
def test_the_versions(calls, capsys, arguments):
    jax = versions.installed()["jax"]
    assert page(capsys, *arguments) == (
        f"mlip_jax {mlip_jax.__version__}, jax {jax}, Python {platform.python_version()}\n"
    )


def test_starts_without_jax_and_ends_by_the_exit_code():
    """Processes that load data import the main program: it must not bring JAX with it."""
    code = (
        "import sys, mlip_jax.main, mlip_jax.__main__\n"
        "assert mlip_jax.main.main(['mlip', '--version']) == 0\n"
        "assert mlip_jax.main.main(['mlip', 'train', '--help']) == 0\n"
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
    assert done.returncode == 2 and done.stderr.startswith("error: unknown subcommand"), done.stderr
