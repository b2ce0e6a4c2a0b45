"""The evaluation of a model: every family of figures on every dataset that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.registry import EVALUATIONS
from mlip_jax.data.sets.records import Source
from mlip_jax.evaluations import pairs, prompts
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.results import Results
from mlip_jax.evaluations.sets import Sets

# By name, the evaluations of a suite; "all" is every one that is registered.
SUITES = {
    "mlip": ("retrieval", "zero_shot", "linear_probe"),
    "clip_lite": ("retrieval", "zero_shot", "linear_probe", "svm", "grounding", "concepts"),
    "coca": ("retrieval", "zero_shot", "captioning"),
}
ALL = "all"
# What a run that was evaluated on nothing says at its end, and in its report.
WITHOUT_VALIDATION = (
    "Nothing was evaluated: the run has no validation set. --config.data.validation=5% with a new "
    "--workdir holds that share of the training set out; mlip evaluate --workdir=DIR "
    "--config.data.validation=KIND:PATH evaluates this run on another dataset."
)
PAIRS = "pairs"  # of models that score pairs, and have no joint space


def at_intervals() -> list[str]:
    """The families that are fast enough to be repeated while training."""
    return [name for name, family in EVALUATIONS.items() if family.at_intervals]


def the_others() -> list[str]:
    """The families that wait for the end of training."""
    return [name for name, family in EVALUATIONS.items() if not family.at_intervals]


def apply_suite(config: ConfigDict, suite: str) -> None:
    """Leaves in config.evaluation the families of a suite alone, each with a dataset, in place.

    Args:
      config: its datasets stay where it names some; elsewhere the family's default dataset
        comes in.
      suite: "mlip" and "clip_lite" are the evaluations of those papers, "all" every one; or names
        of families, separated by commas.

    Raises:
      UserError: for an unknown name.
    """
    suites = SUITES | {ALL: tuple(EVALUATIONS)}
    chosen = suites.get(suite) or tuple(filter(None, suite.split(",")))
    valid = (*suites, *EVALUATIONS)
    for name in chosen or (suite,):
        if name not in EVALUATIONS:
            raise UserError(
                f"--suite={suite}: {name!r} is none of {', '.join(valid)}{suggestion(name, valid)}"
            )
    left = [name for name in chosen if suite in suites and not EVALUATIONS[name].fits(config)]
    for name in EVALUATIONS:
        if name not in chosen or name in left:
            config.evaluation[name] = ()
        elif not config.evaluation[name]:
            config.evaluation[name] = (EVALUATIONS[name].default_set,)


def _why_left_out(family: str, validation: Source | None) -> str:
    wanted, example = EVALUATIONS[family].wants
    lack = f"{validation.name} lacks {wanted}" if validation else "there is no validation set"
    return f"{lack}; add --config.evaluation.{family}={example}"


def check(config: ConfigDict) -> None:
    """Finds now what would otherwise end a run at its first evaluation, hours later.

    Raises:
      UserError: for datasets that cannot be opened, or prompts without a slot.
    """
    prompts.check(config)
    sets = Sets(None, config, progress=False)
    for name in EVALUATIONS:
        for spec in config.evaluation[name]:
            if spec != "validation":
                EVALUATIONS[name].check(sets, spec)


def evaluate(
    model: Encoder,
    config: ConfigDict,
    validation: Source | None = None,
    progress: bool = True,
    families: Sequence[str] | None = None,
    done: Results | None = None,
    keep: Callable[[Results], None] | None = None,
    sets: Sets | None = None,
) -> Results:
    """Scores a model on config.evaluation's datasets.

    "validation" stands for the run's own validation set and gives what it can: without captions
    no retrieval, without labels no zero-shot classification, and nothing when there is none. A
    dataset that is named outright must have what it is named for.

    Args:
      model: what embeds images and texts.
      config: the run's config.
      validation: the run's validation set if it is open already.
      progress: whether to draw bars; a caller that draws its own says no.
      families: those to evaluate; None: all. The config names the datasets.
      done: figures of the same model that an evaluation which was cut short has kept; they are
        not computed again.
      keep: called with all results so far after each dataset.
      sets: of the same model, for datasets that are embedded already; see `Sets.under`.

    Raises:
      UserError: for an empty dataset, a dataset without captions or labels, a class without images,
        or a template without a slot.
      RunError: for NaN or infinity among the embeddings.
    """
    results = Results() if done is None else done
    families = list(EVALUATIONS) if families is None else families
    sets = sets or Sets(model, config, validation, progress)
    if config.model.critic == "concat":
        source = sets.source("validation") if "retrieval" in families else None
        if source is not None:
            scorer = cast(pairs.PairScorer, model)  # as the config's critic says
            results.add(PAIRS, pairs.score(scorer, source, config.evaluation.batch_size))
        families = [name for name in families if not EVALUATIONS[name].needs_joint_space]
    for name in families:
        for spec in config.evaluation[name]:
            place = f"{name}={spec}"
            if place in results.done:
                continue
            outcome = EVALUATIONS[name].score(sets, spec)
            if outcome is not None:
                results.add(name, outcome)
            elif spec == "validation":
                results.left_out[name] = _why_left_out(name, sets.source(spec))
            results.done.append(place)
            if keep is not None:
                keep(results)
    return results
