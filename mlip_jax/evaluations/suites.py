"""The evaluation of a model: every family of figures on every set that the config names for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

from ml_collections import ConfigDict

from mlip_jax.config import EVALUATIONS, UserError, suggestion
from mlip_jax.data.sets.records import Source
from mlip_jax.evaluations import pairs, prompts
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.results import Results
from mlip_jax.evaluations.sets import Sets

# The set of a family in a suite where the config names none for it.
_DEFAULT_SETS = dict.fromkeys(EVALUATIONS, "validation") | {
    "grounding": "compositions",
    "concepts": "gender",
}
WITHOUT_JOINT_SPACE = ("linear_probe", "few_shot", "svm", "grounding")
AT_INTERVALS = ("retrieval", "zero_shot")  # fast enough to be repeated while training

SUITES = {
    "mlip": ("retrieval", "zero_shot", "linear_probe"),
    "clip_lite": ("retrieval", "zero_shot", "linear_probe", "svm", "grounding", "concepts"),
    "all": EVALUATIONS,
}


def family(name: str) -> ModuleType:
    """The module of a family of evaluations, imported when it is asked for.

    It has `score(sets, spec) -> Outcome | None`, None where "validation" cannot give it, and
    `check(sets, spec)`, which raises UserError for a set that it cannot be done on.
    """
    place = "concepts.editing" if name == "concepts" else name
    return importlib.import_module(f"mlip_jax.evaluations.{place}")


def apply_suite(config: ConfigDict, suite: str) -> None:
    """Leaves in config.evaluation the families of a suite alone, each with a set, in place.

    Args:
      config: its sets stay where it names some; elsewhere the family's default set comes in.
      suite: "mlip" and "clip_lite" are the evaluations of those papers, "all" every one; or names
        of families, separated by commas.

    Raises:
      UserError: for an unknown name.
    """
    chosen = SUITES.get(suite) or tuple(filter(None, suite.split(",")))
    valid = (*SUITES, *EVALUATIONS)
    for name in chosen or (suite,):
        if name not in EVALUATIONS:
            raise UserError(
                f"--suite={suite}: {name!r} is none of {', '.join(valid)}{suggestion(name, valid)}"
            )
    for name in EVALUATIONS:
        if name not in chosen:
            config.evaluation[name] = ()
        elif not config.evaluation[name]:
            config.evaluation[name] = (_DEFAULT_SETS[name],)


def check(config: ConfigDict) -> None:
    """Finds now what would otherwise end a run at its first evaluation, hours later.

    Raises:
      UserError: for sets that cannot be opened, or prompts without a slot.
    """
    prompts.check(config)
    sets = Sets(None, config, progress=False)
    for name in EVALUATIONS:
        for spec in config.evaluation[name]:
            if spec != "validation":
                family(name).check(sets, spec)


def evaluate(
    model: Encoder,
    config: ConfigDict,
    validation: Source | None = None,
    progress: bool = True,
    families: Sequence[str] = EVALUATIONS,
    done: Results | None = None,
    keep: Callable[[Results], None] | None = None,
) -> Results:
    """Scores a model on config.evaluation's sets.

    "validation" stands for the run's own validation set and gives what it can: without captions
    no retrieval, without labels no zero-shot classification, and nothing when there is none. A
    set that is named outright must have what it is named for.

    Args:
      model: what embeds images and texts.
      config: the run's config.
      validation: the run's validation set if it is open already.
      progress: whether to draw bars; a caller that draws its own says no.
      families: those to evaluate; the config names the sets.
      done: figures of the same model that an evaluation which was cut short has kept; they are
        not computed again.
      keep: called with all results so far after each set.

    Raises:
      UserError: for an empty set, a set without captions or labels, a class without images, or a
        template without a slot.
      RunError: for NaN or infinity among the embeddings.
    """
    results = Results() if done is None else done
    sets = Sets(model, config, validation, progress)
    if config.model.critic == "concat":
        source = sets.source("validation") if "retrieval" in families else None
        if source is not None:
            results.add("pairs", pairs.score(model, source, config.evaluation.batch_size))
        families = [name for name in families if name in WITHOUT_JOINT_SPACE]
    for name in families:
        for spec in config.evaluation[name]:
            place = f"{name}={spec}"
            if place in results.done:
                continue
            outcome = family(name).score(sets, spec)
            if outcome is not None:
                results.add(name, outcome)
            results.done.append(place)
            if keep is not None:
                keep(results)
    return results
