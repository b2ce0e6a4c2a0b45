"""The subcommands: which function does each, and what its help page says."""

from __future__ import annotations

from dataclasses import dataclass

from mlip_jax.core.errors import UserError, suggestion

DEFAULT = "train"  # where the command line names no subcommand


@dataclass(frozen=True)
class Subcommand:
    """One thing that the program does; `mlip_jax.cli.flags` has the flags that it takes.

    Attributes:
      module: imported only when the subcommand is asked for.
      function: of (config, workdir, **options) -> exit code, in that module.
      summary: one line for the overview.
      usage: the ways to call it, after its name.
      description: paragraphs.
      examples: whole command lines; "\\" and a line break where one is longer than a page is wide.
    """

    module: str
    function: str
    summary: str
    usage: tuple[str, ...]
    description: tuple[str, ...]
    examples: tuple[str, ...]


SUBCOMMANDS = {
    "train": Subcommand(
        "mlip_jax.training.verb",
        "train",
        "train a model, evaluate it and write a report (default)",
        (
            "--config=CONFIG [--workdir=DIR] [--config.KEY=VALUE ...]",
            "--workdir=DIR [--config.samples=MORE]",
            "--from=RUN --workdir=DIR [--config.KEY=VALUE ...]",
        ),
        (
            "Trains the model that a config describes, evaluates it and writes a report into the "
            "workdir. The same command resumes a run that was stopped, and so does --workdir "
            "alone. A run of a schedule with a cooldown can be made longer; --from starts a branch "
            "of any run.",
            "The exit code is 0 when the run is complete, 75 when it was told to stop and has "
            "saved everything, 1 when it failed and 2 for a mistake on the command line or in the "
            "config.",
        ),
        (
            "mlip train --config=mlip",
            "mlip train --config=mlip --workdir=runs/half --config.samples=100000",
            "mlip train --config=mlip:size=B/16,data=jsonl:pairs.jsonl",
            "mlip train --from=runs/mlip --workdir=runs/lower \\\n"
            "  --config.optimizer.learning_rate=1e-4",
        ),
    ),
    "evaluate": Subcommand(
        "mlip_jax.evaluations",
        "evaluate_workdir",
        "evaluate a trained model, or compare the results of several runs",
        (
            "--workdir=DIR [--suite=NAME,...] [--rates=RATE,...] [--config.KEY=VALUE ...]",
            "--compare=DIR,DIR [--workdir=DIR]",
        ),
        (
            "Evaluates the newest checkpoint of a run, an exported model, or a model of open_clip "
            "or Hugging Face. It prints the metrics and writes them to results.json, .md and "
            ".html. An evaluation that was stopped goes on at the dataset where it was.",
            "With --compare it evaluates nothing: it prints the results of several workdirs side "
            "by side. Runs that differ in their seed alone share a column.",
        ),
        (
            "mlip evaluate --workdir=runs/mlip --suite=all",
            "mlip evaluate --workdir=runs/mlip --suite=linear_probe,svm \\\n"
            "  --config.evaluation.linear_probe=folder:flowers \\\n"
            "  --config.evaluation.svm=voc:VOC2007",
            "mlip evaluate --workdir=CLIP_FOLDER --rates=0,0.25,0.5",
            "mlip evaluate --compare='runs/mlip*,runs/clip*'",
        ),
    ),
    "report": Subcommand(
        "mlip_jax.reports",
        "report_workdir",
        "write the report of a run again",
        ("--workdir=DIR [--config.KEY=VALUE ...]",),
        ("Writes the report of a run's newest checkpoint into its workdir again.",),
        ("mlip report --workdir=runs/mlip",),
    ),
    "prepare": Subcommand(
        "mlip_jax.data.prepare",
        "prepare",
        "convert a dataset to shards that are fast to read",
        (
            "--source=KIND:PATH --out=DIR [flags]",
            "--source=KIND:PATH --out=DIR --score=FOLDER [--keep=SHARE] [flags]",
            "--check --out=DIR",
            "--teacher=FOLDER --out=DIR --config=CONFIG [--views=N]",
        ),
        (
            "Reads a dataset, checks every record and writes ArrayRecord shards, an index, "
            "checksums and a dataset card. The same command continues a run that was stopped and "
            "repairs damaged shards.",
            "docs/data.md describes the kinds of --source and what is checked.",
            "With --teacher it keeps what a model says of a finished dataset; see "
            "docs/teachers.md.",
        ),
        (
            "mlip prepare --source=webdataset:'tars/{00000..00331}.tar' \\\n"
            "  --out=data/cc3m --resize=256",
            "mlip prepare --source=csv:pairs.tsv --out=data/pairs \\\n"
            "  --columns=image=path,caption=title",
            "mlip prepare --source=csv:pairs.tsv --out=data/best \\\n"
            "  --score=runs/large --keep=0.3 --near-duplicates=0.95",
            "mlip prepare --check --out=data/pairs",
            "mlip prepare --teacher=runs/large --out=data/pairs \\\n"
            "  --config=clip_kd:teacher=kept --config.data.caption.tags=0",
            "mlip train --config=mlip:data=prepared:data/pairs",
        ),
    ),
    "export": Subcommand(
        "mlip_jax.export",
        "export",
        "write a model for other programs: weights or compiled functions",
        ("--workdir=DIR --out=DIR [--format=NAME] [--config.KEY=VALUE ...]",),
        (
            "Writes the model of a workdir into a new folder, with its tokenizer, its "
            "preprocessing and a model card. docs/models.md describes the formats.",
        ),
        (
            "mlip export --workdir=runs/mlip --out=mlip_model",
            "mlip export --workdir=runs/clip --out=clip_hf --format=hf_clip",
        ),
    ),
    "search": Subcommand(
        "mlip_jax.search",
        "search",
        "search a folder of images by words or by an image",
        (
            "--workdir=DIR --images=FOLDER [--index=DIR]",
            "--workdir=DIR [--text=WORDS] [--image=FILE] [--top=N]",
            "--workdir=DIR --serve[=PORT]",
        ),
        (
            "Indexes a folder of images by a model, prints the images that are nearest to a text "
            "or to an image, and serves a search page to browsers on this machine. The flags may "
            "be combined: it indexes first, then searches, then serves.",
        ),
        (
            "mlip search --workdir=runs/mlip --images=photos",
            'mlip search --workdir=runs/mlip --text="a red car" --top=20',
            "mlip search --workdir=runs/mlip --image=car.jpg",
            "mlip search --workdir=runs/mlip --serve",
        ),
    ),
    "plan": Subcommand(
        "mlip_jax.planning",
        "plan",
        "estimate the memory and time of training on another machine",
        ("--config=CONFIG --topology=NAME [--mesh=AXIS:SIZE,...] [--largest-batch]",),
        (
            "Compiles the training step for a machine that need not be there and prints what it "
            "needs: memory per device, traffic between devices, time per step. It reads no data "
            "and writes nothing.",
            "The exit code is 0 when the step fits into the memory of the devices, 1 when it does "
            "not.",
        ),
        (
            "mlip plan --config=mlip --topology=cpu:8",
            "mlip plan --config=clip:size=B/16,data=jsonl:pairs.jsonl \\\n"
            "  --topology=v5e:16x16 --mesh=data:64,fsdp:4 --largest-batch",
            "mlip plan --config=mlip:size=B/16 --topology=h100:8 --config.batch_size=1024",
        ),
    ),
    "benchmark": Subcommand(
        "mlip_jax.benchmark",
        "benchmark",
        "measure how fast configs train on this machine",
        (
            "--config=CONFIG [--compare='CONFIG --config.KEY=VALUE'] [flags]",
            "--config=CONFIG --against=open_clip [flags]",
            "--config=CONFIG --only=data [flags]",
        ),
        (
            "Times the training step of a config on this machine and writes the result as JSON "
            "into the workdir. Several configs, or a config and open_clip, take turns, so that "
            "other load on the machine meets all of them.",
        ),
        (
            "mlip benchmark --config=mlip",
            "mlip benchmark --config=mlip \\\n"
            "  --compare='mlip --config.model.image.merging.rate=0'",
            "mlip benchmark --config=clip:size=B/32 \\\n"
            "  --config.batch_size=32 --against=open_clip",
        ),
    ),
    "study": Subcommand(
        "mlip_jax.study",
        "study",
        "train a table of configs with several seeds and compare them",
        ("--table=FILE --out=DIR [--parallel=N]",),
        (
            "Trains every row of a table with every seed, one run after the other or several at a "
            "time, and writes study.md: means and standard deviations over the seeds, and all runs "
            "with their commands, times and metrics. The same command goes on where a study was "
            "stopped: complete runs are not run again, others are resumed.",
            "The table is JSON or Python; docs/evaluations.md describes it.",
            "The exit code is 0 when all runs are complete, 75 when the study was told to stop and "
            "the runs have saved, and 1 when a run failed; the others are run all the same.",
        ),
        (
            "mlip study --table=losses.json --out=studies/losses",
            "mlip study --table=losses.json --out=studies/losses --parallel=2",
        ),
    ),
}


def check(name: str) -> None:
    """Raises UserError for what is no subcommand, naming the nearest."""
    if name not in SUBCOMMANDS:
        raise UserError(
            f"unknown subcommand {name!r}: expected one of {', '.join(SUBCOMMANDS)}"
            f"{suggestion(name, SUBCOMMANDS)}"
        )
