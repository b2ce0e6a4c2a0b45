"""The model card: what an exported model is, what it was trained on, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlip_jax.core.markdown import code, plain
from mlip_jax.core.versions import __version__
from mlip_jax.evaluations.results import read_results
from mlip_jax.evaluations.sheets import markdown, sheet
from mlip_jax.inference import Model
from mlip_jax.interop import model_folders
from mlip_jax.storage.workdir import origin

FILE_NAME = "README.md"
_USE = {
    "mlip": """\
import mlip_jax

model = mlip_jax.load("FOLDER")
images = model.encode_image(["cat.jpg"])
texts = model.encode_text(["a photo of a cat"])
print(model.logit_scale * images @ texts.T + model.logit_bias)""",
    "hf_clip": """\
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER")""",
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "stablehlo": """\
from pathlib import Path

from jax import export

encode = export.deserialize(bytearray(Path("FOLDER/encode_image.stablehlo").read_bytes()))
embeddings = encode.call(pixels)  # uint8 [batch, size, size, 3]; see signature.json""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/encode_image.onnx")
(embeddings,) = session.run(None, {session.get_inputs()[0].name: pixels})  # see signature.json""",
}
_SHOWN = ("architecture", "width", "depth", "heads", "activation")


def write(folder: Path, model: Model, source: Path, form: str, notes: Sequence[str]) -> None:
    """Writes the card as README.md.

    Args:
      folder: of the exported model.
      model: that was exported.
      source: where it came from; its results, its data's attribution and licences are quoted.
      form: the format's name.
      notes: what was lost.
    """
    config = model.config
    parts = [
        "---",
        "library_name: mlip_jax",
        "tags: [image-text, contrastive]",
        "---",
        "",
        f"# {plain(config.name)}",
        "",
        f"An image encoder and a text encoder into one space of {config.model.embed_dim} "
        f"dimensions, exported by mlip_jax {__version__} as {form}.",
        "",
        "```python",
        _USE[form],
        "```",
        "",
        "## Model",
        "",
        *_model(model),
        "",
        "## Data",
        "",
        *_data(model, source),
        "",
        "## Results",
        "",
        _results(source),
        "",
        "## Licence and attributions",
        "",
        *_licence(model, source),
    ]
    if notes:
        parts += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    settings = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
    parts += ["", "## Config", "", "```json", settings, "```", ""]
    (folder / FILE_NAME).write_text("\n".join(parts), encoding="utf-8")


def _model(model: Model) -> list[str]:
    lines = []
    for tower in ("image", "text"):
        settings = model.config.model[tower]
        words = ", ".join(f"{key} {settings[key]}" for key in _SHOWN)
        lines.append(f"- {tower} encoder: {words}")
    image, text = model.config.model.image, model.config.model.text
    prepared = model.preprocess
    lines += [
        f"- images: {prepared.image_size} pixels, resized by {prepared.resize!r} "
        f"({prepared.interpolation}), mean {_numbers(prepared.mean)}, deviation "
        f"{_numbers(prepared.std)}",
        f"- texts: up to {text.context_length} tokens of {model.tokenizer.vocab_size}, cleaning "
        f"{model.tokenizer.cleaning!r}",
        f"- Frequency Stage: {image.frequency.depth} blocks; token merging rate "
        f"{image.merging.rate:g}",
        f"- logit scale {model.logit_scale:.4g}, logit bias {model.logit_bias:.4g}",
    ]
    if model.step is not None:
        lines.append(f"- checkpoint: step {model.step}")
    commit = origin()["commit"]
    if commit:
        lines.append(f"- code: {commit}")
    return lines


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _data(model: Model, source: Path) -> list[str]:
    if model_folders.kind(source) not in ("workdir", "exported"):
        return ["Unknown here: the model is another library's. See where it comes from."]
    data, config = model.config.data, model.config
    lines = [
        f"- training set: {code(data.train)}",
        f"- samples seen by the whole run: {config.samples:,}, in batches of {config.batch_size}",
    ]
    if config.model.pretrained:
        lines.append(f"- started from {code(config.model.pretrained)}")
    return lines


def _results(source: Path) -> str:
    results = read_results(source)
    if not results.figures:
        return "None are known: `mlip evaluate --workdir=FOLDER` finds some."
    return markdown(sheet(results, "Results")).partition("\n")[2].strip()  # without its title


def _licence(model: Model, source: Path) -> list[str]:
    lines = [
        "The code is under the Apache License 2.0. The weights are for whom they belong to to "
        "license: state it here before you share them.",
    ]
    attribution = str(model.about.get("attribution", ""))
    if attribution:
        lines += ["", "Data:", "", *(f"> {plain(line)}" for line in attribution.splitlines())]
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (source / name).is_file():
            lines += ["", f"The source folder's own {name} applies."]
    return lines
