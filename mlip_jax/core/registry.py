"""The kinds of things that a config can name, one table each.

What comes with the package stands here by its place, "module:attribute", and is imported when it is
first used: to know the names costs nothing. A config file adds things of its own, without a fork:

    from mlip_jax.core.registry import LOSSES
    LOSSES.register("hinge", over_all_pairs(hinge))

CONTRIBUTING.md has a whole example of each kind.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

from mlip_jax.core.errors import UserError, suggestion

if TYPE_CHECKING:
    from mlip_jax.data.prepare.readers import MakeReader
    from mlip_jax.data.sets.kinds import DatasetKind
    from mlip_jax.evaluations.family import Family
    from mlip_jax.export.verb import WriteModel
    from mlip_jax.models.encoders import ImageEncoderKind, TextEncoderKind
    from mlip_jax.models.predictions import Prediction
    from mlip_jax.objectives.distillation import Distillation
    from mlip_jax.objectives.losses import Loss
    from mlip_jax.training.optimizer import MakeOptimizer, MakeSchedule

Thing = TypeVar("Thing")


class Table(Mapping[str, Thing], Generic[Thing]):
    """Things of one kind by name.

    Iterating gives the names, in the order of the listing; `table[name]` the thing.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        """Takes what messages call such a thing, and the built-in ones as "module:attribute"."""
        self.kind = kind
        self._places = dict(places)
        self._registered: dict[str, Thing] = {}
        self._files: dict[str, str] = {}  # name -> the file that registered it

    def register(self, name: str, thing: Thing) -> Thing:
        """Adds a thing under a new name, and returns it.

        The same file may register its name again, as when it is run a second time.

        Raises:
          UserError: when the name is taken.
        """
        file = os.path.abspath(sys._getframe(1).f_code.co_filename)
        holder = self._files.get(name, "mlip_jax" if name in self._places else file)
        if holder != file:
            raise UserError(
                f"a {self.kind} named {name!r} is already registered by {holder}: choose another "
                "name"
            )
        self._registered[name], self._files[name] = thing, file
        return thing

    def unregister(self, name: str) -> None:
        """Takes a registered thing away again; built-in ones stay."""
        del self._registered[name], self._files[name]

    def __getitem__(self, name: str) -> Thing:
        """The thing.

        Raises:
          UserError: for a name that is not in the table; it names the nearest.
        """
        if name in self._registered:
            return self._registered[name]
        if name not in self._places:
            raise UserError(f"unknown {self.kind} {name!r}: {self.expected(name)}")
        module, _, attribute = self._places[name].partition(":")
        thing: Thing = getattr(importlib.import_module(module), attribute)
        return thing

    def expected(self, name: object) -> str:
        """What a message says after a wrong name: all names, and the nearest."""
        return f"expected one of {', '.join(self)}{suggestion(str(name), self)}"

    def check(self, key: str, name: object) -> None:
        """Raises UserError unless `name`, the value of config.`key`, is in the table."""
        if name not in self:
            raise UserError(
                f"config.{key}={name!r} is no {self.kind}: {self.expected(name)}. One of your own "
                "must be registered first: by the file of --config, or by --import=FILE"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._registered or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places | self._registered)

    def __len__(self) -> int:
        return len(self._places | self._registered)


LOSSES: Table[Loss] = Table(
    "loss",
    {
        "softmax": "mlip_jax.objectives.losses:SOFTMAX",
        "sigmoid": "mlip_jax.objectives.losses:SIGMOID",
        "jsd": "mlip_jax.objectives.losses:JSD",
    },
)
# What a run learns from a teacher; each is a section of config.distillation.
DISTILLATIONS: Table[Distillation] = Table(
    "way to learn from a teacher",
    {
        "features": "mlip_jax.objectives.distillation:FEATURES",
        "relation": "mlip_jax.objectives.distillation:RELATION",
    },
)
# Perspectives that predict something, beside those of schema.PERSPECTIVES, which compare views.
PREDICTIONS: Table[Prediction] = Table(
    "prediction", {"caption": "mlip_jax.models.captioning:CAPTION"}
)
IMAGE_ENCODERS: Table[ImageEncoderKind] = Table(
    "image encoder",
    {
        "vit": "mlip_jax.models.encoders:VIT",
        "resnet": "mlip_jax.models.encoders:RESNET",
    },
)
TEXT_ENCODERS: Table[TextEncoderKind] = Table(
    "text encoder",
    {
        "clip": "mlip_jax.models.encoders:CLIP",
        "bert": "mlip_jax.models.encoders:BERT",
    },
)
OPTIMIZERS: Table[MakeOptimizer] = Table(
    "optimizer",
    {
        "adamw": "mlip_jax.training.optimizer:adamw",
        "muon": "mlip_jax.training.optimizer:muon",
        "sgd": "mlip_jax.training.optimizer:sgd",
    },
)
SCHEDULES: Table[MakeSchedule] = Table(
    "schedule",
    {
        "cosine": "mlip_jax.training.optimizer:cosine",
        "constant": "mlip_jax.training.optimizer:constant",
        "wsd": "mlip_jax.training.optimizer:constant",
        "rsqrt": "mlip_jax.training.optimizer:rsqrt",
    },
)
EVALUATIONS: Table[Family] = Table(
    "evaluation",
    {
        "retrieval": "mlip_jax.evaluations.retrieval:FAMILY",
        "zero_shot": "mlip_jax.evaluations.zero_shot:FAMILY",
        "linear_probe": "mlip_jax.evaluations.linear_probe:FAMILY",
        "few_shot": "mlip_jax.evaluations.few_shot:FAMILY",
        "svm": "mlip_jax.evaluations.svm:FAMILY",
        "grounding": "mlip_jax.evaluations.grounding:FAMILY",
        "concepts": "mlip_jax.evaluations.concepts.editing:FAMILY",
        "guidance": "mlip_jax.evaluations.guidance:FAMILY",
        "calibration": "mlip_jax.evaluations.calibration:FAMILY",
        "corruptions": "mlip_jax.evaluations.corruptions:FAMILY",
        "compositional": "mlip_jax.evaluations.compositional:FAMILY",
        "multilingual": "mlip_jax.evaluations.multilingual:FAMILY",
        "captioning": "mlip_jax.evaluations.captioning:FAMILY",
    },
)
DATASETS: Table[DatasetKind] = Table(
    "dataset",
    {
        "emoji": "mlip_jax.data.sets.tfds:EMOJI",
        "jsonl": "mlip_jax.data.sets.jsonl:KIND",
        "csv": "mlip_jax.data.sets.csv_tables:KIND",
        "folder": "mlip_jax.data.sets.class_folders:KIND",
        "zip": "mlip_jax.data.sets.zip_archives:KIND",
        "idx": "mlip_jax.data.sets.mnist:KIND",
        "coco": "mlip_jax.data.sets.coco:KIND",
        "karpathy": "mlip_jax.data.sets.karpathy:KIND",
        "voc": "mlip_jax.data.sets.voc:KIND",
        "objects": "mlip_jax.data.sets.coco_objects:KIND",
        "prepared": "mlip_jax.data.sets.prepared:KIND",
        "webdataset": "mlip_jax.data.tars.source:KIND",
        "wds": "mlip_jax.data.tars.source:KIND",
        "tfds": "mlip_jax.data.sets.tfds:TFDS",
        "object": "mlip_jax.data.sets.kinds:OBJECT",
    },
)
# Sources of `prepare`, beside every dataset of DATASETS.
READERS: Table[MakeReader] = Table(
    "source",
    {
        "webdataset": "mlip_jax.data.prepare.webdataset:WebDataset",
        "wds": "mlip_jax.data.prepare.webdataset:WebDataset",
        "parquet": "mlip_jax.data.prepare.arrow:Parquet",
        "huggingface": "mlip_jax.data.prepare.arrow:HuggingFace",
        "hf": "mlip_jax.data.prepare.arrow:HuggingFace",
        "csv": "mlip_jax.data.prepare.tables:Table",
        "tsv": "mlip_jax.data.prepare.tables:Table",
        "jsonl": "mlip_jax.data.prepare.tables:JsonLines",
        "coco": "mlip_jax.data.prepare.opened_sets:CocoCaptions",
    },
)
EXPORT_FORMATS: Table[WriteModel] = Table(
    "format",
    {
        "mlip": "mlip_jax.export.own:write",
        "hf_clip": "mlip_jax.export.hugging_face:write",
        "open_clip": "mlip_jax.export.open_clip:write",
        "stablehlo": "mlip_jax.export.stablehlo:write",
        "onnx": "mlip_jax.export.onnx:write",
    },
)
