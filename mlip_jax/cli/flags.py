"""The flags, in one table: definitions, checks, help pages and typed values come from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from absl import flags

from mlip_jax.cli.kinds import (
    ON,
    Address,
    Choice,
    Kind,
    Registered,
    Share,
    Shares,
    Switch,
    Text,
    Whole,
    listed,
)
from mlip_jax.cli.subcommands import SUBCOMMANDS
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.key_names import find_key
from mlip_jax.core.registry import EVALUATIONS, EXPORT_FORMATS
from mlip_jax.core.schema import PROCESS_VARIABLES, default, flatten


@dataclass(frozen=True)
class Use:
    """What a flag is to a subcommand.

    Attributes:
      kind: of its value.
      metavar: what stands for the value on the help page; "" for a switch.
      help: what it does, without a full stop.
      default: the value of the subcommand's function where the flag is left out, for the help page;
        None: the help says what happens then, or there is nothing to say.
      missing: what the subcommand cannot do without, and how to add it; "": the flag is optional.
    """

    kind: Kind
    metavar: str
    help: str
    default: Any = None
    missing: str = ""


@dataclass(frozen=True)
class Flag:
    """A flag and every subcommand that takes it.

    Attributes:
      name: without dashes; the keyword of the subcommands' functions has underscores in it.
      uses: by subcommand.
      bare: the value of a flag that is given without one; "": it needs a value.
      variable: of the environment, which the flag stands for; the functions read that.
    """

    name: str
    uses: Mapping[str, Use]
    bare: str = ""
    variable: str = ""

    @property
    def keyword(self) -> str:
        """The name of its value."""
        return self.name.replace("-", "_")


_CONFIG = "CONFIG[:NAME=VALUE,...]"
_OF_SEVERAL = ("train", "evaluate", "report", "search")  # subcommands of several processes
_MODEL = "the folder of a run, an exported model, or a model of open_clip or Hugging Face"


def _process(flag: str, kind: Kind, metavar: str, help: str) -> Flag:
    variable = PROCESS_VARIABLES[flag]
    use = Use(kind, metavar, f"{help} (or {variable} in the environment)")
    return Flag(flag, dict.fromkeys(_OF_SEVERAL, use), variable=variable)


def _page(flag: str, help: str) -> Flag:
    return Flag(flag, dict.fromkeys(SUBCOMMANDS, Use(Switch(), "", help)), bare=ON)


FLAGS = (
    Flag(
        "config",
        {
            "train": Use(
                Text(),
                _CONFIG,
                "the config of the experiment: a config file, or the name of one that comes with "
                "the package, such as mlip; what follows the colon is handed to its get_config",
            ),
            **dict.fromkeys(
                ("evaluate", "report", "export", "search"),
                Use(Text(), _CONFIG, "a config in place of the workdir's own"),
            ),
            "prepare": Use(
                Text(),
                _CONFIG,
                "with --teacher: the config of the runs that will learn from it, by whose "
                "augmentation images are shown",
            ),
            **dict.fromkeys(
                ("plan", "benchmark"),
                Use(
                    Text(),
                    _CONFIG,
                    "a config file, or a name such as mlip (default: the config of --workdir)",
                ),
            ),
        },
    ),
    Flag(
        "workdir",
        {
            "train": Use(
                Text(),
                "DIR",
                "the folder of the run, also in a bucket (gs://, s3://); one that holds the run "
                "already is resumed, and needs no --config (default: runs/NAME with NAME from the "
                "config)",
            ),
            "evaluate": Use(
                Text(),
                "DIR",
                f"{_MODEL}; with --compare: where the comparison is written",
            ),
            **dict.fromkeys(
                ("export", "search"),
                Use(Text(), "DIR", _MODEL),
            ),
            "report": Use(Text(), "DIR", "the folder of the run"),
            "plan": Use(Text(), "DIR", "a run whose config is used"),
            "benchmark": Use(
                Text(), "DIR", "where the result is written (default: runs/NAME of the config)"
            ),
        },
    ),
    Flag(
        "from",
        {
            "train": Use(
                Text(),
                "RUN",
                "start a branch in --workdir from the weights and the optimizer of this run, "
                "under its config or --config, with overrides; its schedule starts anew",
            )
        },
    ),
    Flag(
        "profile",
        {
            "train": Use(
                Whole(1),
                "STEPS",
                "trace so many steps of this start into the folder profile of the workdir, for "
                "TensorBoard and xprof",
            )
        },
    ),
    Flag(
        "track",
        {
            "train": Use(
                Text("wandb, mlflow, or both with a comma", r"(wandb|mlflow)(,(wandb|mlflow))*"),
                "NAME,...",
                "also send config, metrics and evaluations to wandb or mlflow, which the extras "
                "of these names install",
            )
        },
    ),
    Flag(
        "suite",
        {
            "evaluate": Use(
                Text(f"mlip, clip_lite, coca, all, or some of {', '.join(EVALUATIONS)}"),
                "NAME,...",
                "mlip or clip_lite (the evaluations of those papers), all, or some of "
                f"{', '.join(EVALUATIONS)} (default: those that config.evaluation has datasets "
                "for)",
            )
        },
    ),
    Flag(
        "rates",
        {
            "evaluate": Use(
                Shares(0.95),
                "RATE,...",
                "evaluate and time the model at these rates of token merging, and at 0",
            )
        },
    ),
    Flag(
        "import",
        dict.fromkeys(
            ("train", "evaluate", "report", "export", "search", "plan", "benchmark"),
            Use(
                Text(repeated=True),
                "FILE",
                "a Python file that is run first, for the losses, encoders or datasets that it "
                "registers; may be repeated",
            ),
        ),
    ),
    Flag(
        "compare",
        {
            "evaluate": Use(
                Text("workdirs with commas between", r".*[^,].*", repeated=True),
                "DIR,DIR",
                "print the results of these workdirs side by side; each may be a pattern such as "
                "'runs/mlip*'",
            ),
            "benchmark": Use(
                Text(repeated=True),
                "'CONFIG ...'",
                "another config to time, with overrides of its own after it; may be repeated",
            ),
        },
    ),
    Flag(
        "source",
        {
            "prepare": Use(
                Text(),
                "KIND:PATH",
                "the dataset to read, such as webdataset:TARS, parquet:PATH, huggingface:DIR, "
                "csv:FILE, jsonl:FILE, coco:PATH or folder:DIR; also in a bucket",
            )
        },
    ),
    Flag(
        "out",
        {
            "export": Use(
                Text(),
                "DIR",
                "the folder to write, also in a bucket, which must not exist yet",
                missing="a folder to write: add --out=DIR",
            ),
            "prepare": Use(
                Text(),
                "DIR",
                "the folder of the prepared dataset, also in a bucket",
                missing="a folder to write to: add --out=DIR",
            ),
            "study": Use(
                Text(),
                "DIR",
                "the folder of the study: study.md, the log, and the runs as ROW/seedN",
                missing="a folder for its runs: add --out=DIR",
            ),
        },
    ),
    Flag(
        "table",
        {
            "study": Use(
                Text(),
                "FILE",
                "the configs, seeds and figures of the study: JSON, or Python that sets STUDY",
                missing="a table of configs: add --table=FILE",
            )
        },
    ),
    Flag(
        "parallel",
        {
            "study": Use(
                Whole(1, 1024),
                "N",
                "runs at a time, each on its share of the cores",
                default=1,
            )
        },
    ),
    Flag(
        "columns",
        {
            "prepare": Use(
                Text(),
                "ROLE=NAME,...",
                "the columns of a table, with the roles image, caption, label, tags and split; "
                "by default they are found by their names",
            )
        },
    ),
    Flag(
        "split",
        {
            "prepare": Use(
                Text(),
                "NAME",
                "train, validation or test for all records (default: as the records or the names "
                "of the files say, else train)",
            )
        },
    ),
    Flag(
        "classes",
        {"prepare": Use(Text(), "FILE", "a classes.json that names the numbered classes")},
    ),
    Flag(
        "resize",
        {
            "prepare": Use(
                Whole(0, 65535),
                "PIXELS",
                "make larger images smaller, to this length of their shorter side; 0: keep all "
                "sizes",
                default=0,
            )
        },
    ),
    Flag(
        "shard-records",
        {"prepare": Use(Whole(1), "N", "the most records in a shard", default=5000)},
    ),
    Flag(
        "workers",
        {
            "prepare": Use(
                Whole(1, 1024), "N", "how many processes work (default: one for each core)"
            )
        },
    ),
    Flag(
        "max-skipped-share",
        {
            "prepare": Use(
                Share(), "SHARE", "a larger share of broken records is an error", default=0.01
            ),
            "search": Use(
                Share(), "SHARE", "a larger share of unreadable images is an error", default=0.5
            ),
        },
    ),
    Flag("licence", {"prepare": Use(Text(), "NAME", "the licence of the dataset, for its card")}),
    Flag(
        "attribution",
        {
            "prepare": Use(
                Text(), "TEXT", "whom to name wherever the dataset is shown, for its card"
            )
        },
    ),
    Flag(
        "check",
        {
            "prepare": Use(
                Switch(), "", "only compare the prepared dataset in --out with its checksums"
            )
        },
        bare=ON,
    ),
    Flag(
        "teacher",
        {
            "prepare": Use(
                Text(),
                "FOLDER",
                "keep what the model in this folder says of the prepared dataset in --out, for "
                "runs of --config with config.teacher=kept",
            )
        },
    ),
    Flag(
        "views",
        {
            "prepare": Use(
                Whole(1, 1000), "N", "augmented views of each image for --teacher", default=8
            )
        },
    ),
    Flag(
        "score",
        {
            "prepare": Use(
                Text(),
                "FOLDER",
                "score each pair of image and caption by the model in this folder, and keep the "
                "scores",
            )
        },
    ),
    Flag(
        "keep",
        {
            "prepare": Use(
                Share(zero=False),
                "SHARE",
                "with --score: the best share of the training pairs is kept",
                default=1.0,
            )
        },
    ),
    Flag(
        "near-duplicates",
        {
            "prepare": Use(
                Share(zero=False),
                "COSINE",
                "with --score: of training images whose embeddings have this cosine, or a higher "
                "one, the one with the best caption alone is kept (default: all are)",
            )
        },
    ),
    Flag(
        "format",
        {
            "export": Use(
                Registered(EXPORT_FORMATS),
                "NAME",
                "what is written",
                default="mlip",
            )
        },
    ),
    Flag(
        "images",
        {
            "search": Use(
                Text(),
                "FOLDER",
                "index this folder, or bring its index up to date; also a dataset as KIND:PATH",
            )
        },
    ),
    Flag(
        "index",
        {
            "search": Use(
                Text(),
                "DIR",
                "the folder of the index (default: search/NAME in the workdir, with NAME that of "
                "the images)",
            )
        },
    ),
    Flag("text", {"search": Use(Text(), "WORDS", "find images that show this")}),
    Flag("image", {"search": Use(Text(), "FILE", "find images like this one")}),
    Flag(
        "top",
        {
            "search": Use(
                Whole(1, 1_000_000),
                "N",
                "how many images are found (default: 10, and 48 on the page)",
            )
        },
    ),
    Flag(
        "serve",
        {
            "search": Use(
                Whole(0, 65535),
                "PORT",
                "serve a search page to browsers on this machine, at http://127.0.0.1:8765 or at "
                "another port; 0: any free port",
            )
        },
        bare="8765",
    ),
    Flag(
        "topology",
        {
            "plan": Use(
                Text(),
                "NAME",
                "the machine: a slice of TPU chips such as v5e:16x16 (needs the extra tpu), GPUs "
                "such as h100:8 or, of 4 hosts, h100:4x8 (needs the extra plan-gpu), or CPU "
                "devices such as cpu:8",
                missing="a machine: add --topology=v5e:16x16, --topology=h100:8 or "
                "--topology=cpu:8",
            )
        },
    ),
    Flag(
        "mesh",
        {
            "plan": Use(
                Text(), "AXIS:SIZE,...", "the mesh, such as data:64,fsdp:4 (default: config.mesh)"
            )
        },
    ),
    Flag(
        "largest-batch",
        {"plan": Use(Switch(), "", "also find the largest global batch that fits")},
        bare=ON,
    ),
    Flag(
        "against",
        {
            "benchmark": Use(
                Choice(("open_clip",)),
                "open_clip",
                "time this library's model of the same sizes too (needs the extra bench)",
            )
        },
    ),
    Flag(
        "only",
        {
            "benchmark": Use(
                Choice(("data",)),
                "data",
                "time the loading of data, beside Pillow and beside what the training step takes",
            )
        },
    ),
    Flag(
        "input",
        {
            "benchmark": Use(
                Choice(("random", "data")),
                "NAME",
                "train on one random batch, or on the batches of config.data",
                default="random",
            )
        },
    ),
    Flag(
        "steps",
        {"benchmark": Use(Whole(1, 1_000_000), "N", "how many steps are timed", default=20)},
    ),
    Flag(
        "warmup",
        {"benchmark": Use(Whole(1, 1_000_000), "N", "how many steps come before", default=3)},
    ),
    _process(
        "coordinator",
        Address(),
        "HOST:PORT",
        "where process 0 of several processes of one run listens; docs/launch.md describes such "
        "runs",
    ),
    _process("processes", Whole(1, 1_000_000), "N", "how many processes the run has"),
    _process("process-id", Whole(0, 999_999), "I", "which of them this one is, from 0"),
    _page("help", "print this page"),
    _page("version", "print the versions of mlip_jax, jax and Python"),
)
PAGES = ("help", "version")  # flags that print something in place of what is asked for besides
_BY_NAME = {flag.name: flag for flag in FLAGS}
_BARE = {"-h": f"--help={ON}"} | {
    f"{dashes}{flag.name}": f"--{flag.name}={flag.bare}"
    for flag in FLAGS
    for dashes in ("-", "--")
    if flag.bare
}


def taken_by(subcommand: str) -> list[Flag]:
    """The flags of a subcommand, in the order of the table."""
    return [flag for flag in FLAGS if subcommand in flag.uses]


def takes(subcommand: str, name: str) -> bool:
    """Whether a subcommand takes a flag."""
    return subcommand in _BY_NAME[name].uses


def has_config(subcommand: str) -> bool:
    """Whether a subcommand takes a config; prepare does for a teacher alone."""
    return subcommand != "prepare" and takes(subcommand, "config")


def complete(arguments: Iterable[str]) -> list[str]:
    """Gives flags that need no value the value that they stand for: --serve, --check, -h."""
    return [_BARE.get(argument, argument) for argument in arguments]


def define() -> flags.FlagValues:
    """All flags as absl knows them; their texts are read by `read` and `options`."""
    values = flags.FlagValues()
    for flag in FLAGS:
        flags.DEFINE_multi_string(flag.name, [], "", flag_values=values)
    return values


def read(subcommand: str, values: flags.FlagValues, name: str) -> Any:
    """The value of a flag for a subcommand that takes it; the last one where several are given.

    Returns:
      None where it is not given, a tuple where it may be repeated.

    Raises:
      UserError: for a text that is no value of the flag.
    """
    use = _BY_NAME[name].uses[subcommand]
    parsed = []
    for text in values[name].value or ():
        try:
            parsed.append(use.kind.read(text))
        except ValueError:
            raise UserError(
                f"--{name}={text}: expected {use.kind.expected or f'--{name}={use.metavar}'}"
                f"{suggestion(text, use.kind.choices)}"
            ) from None
    if not parsed:
        return None
    return tuple(parsed) if use.kind.repeated else parsed[-1]


def options(subcommand: str, values: flags.FlagValues) -> dict[str, Any]:
    """The flags that are given, by keyword.

    Raises:
      UserError: for a flag of other subcommands, a wrong value, or a flag that is missing.
    """
    options = {}
    for flag in FLAGS:
        if flag.name in PAGES:
            continue
        if values[flag.name].value and subcommand not in flag.uses:
            takers = list(flag.uses)
            plural = "s" if len(takers) > 1 else ""
            raise UserError(
                f"--{flag.name} goes with the subcommand{plural} {listed(takers)}, not "
                f"with {subcommand}{_override_for(subcommand, flag.name)}"
            )
        if values[flag.name].value:
            options[flag.keyword] = read(subcommand, values, flag.name)
    for flag in taken_by(subcommand):
        if flag.uses[subcommand].missing and flag.keyword not in options:
            raise UserError(f"{subcommand} needs {flag.uses[subcommand].missing}")
    return options


def unknown(subcommand: str, name: str) -> UserError:
    """The error for a flag that is not in the table, with what was most likely meant."""
    near = (
        _override_for(subcommand, name)
        or suggestion(name, [flag.name for flag in taken_by(subcommand)])
        or _override_for(subcommand, name, near=True)
    )
    return UserError(f"unknown flag --{name}{near}")


def _override_for(subcommand: str, name: str, *, near: bool = False) -> str:
    """'; did you mean --config.KEY=VALUE?' with the key of that name; "" where there is none."""
    if not has_config(subcommand):
        return ""
    key = find_key(name, list(flatten(default().to_dict())), near=near)
    return f"; did you mean --config.{key}=VALUE?" if key else ""
