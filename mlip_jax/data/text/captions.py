"""Captions: how they are cleaned, composed at a visit, and mirrored with their image."""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from mlip_jax.core.errors import choose
from mlip_jax.core.schema import CLEANINGS
from mlip_jax.core.texts import whole

_MAX_WORDS = 30
_DELETED_OR_SPACED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def clean_caption(text: str) -> str:
    """A caption as CLIP-Lite (Shrivastava et al. 2021) gives it to its text encoder.

    In lower case; without the characters , . ' ! ? " ( ) * # : ; ~ and with spaces for - and /;
    "<person>" is "person"; single spaces; the first 30 words; without accents (NFKD).

    Decomposition may bring back what went before it ("…" is three full stops), so that all is done
    until nothing changes: a caption that is cleaned twice is the same. That is our choice.
    """
    before = None
    while text != before:
        before = text
        text = text.lower().translate(_DELETED_OR_SPACED).replace("<person>", "person")
        text = " ".join(text.split()[:_MAX_WORDS])
        if text.isascii() and "<person>" not in text:  # nothing is left to change
            break
        letters = unicodedata.normalize("NFKD", text)
        text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return text


def clean(text: str, cleaning: str) -> str:
    """A text as `cleaning` gives it to the tokenizer; UTF-8 can hold it (`texts.whole`).

    Args:
      text: a caption, prompt or query.
      cleaning: "none"; "clip_lite" (`clean_caption`); those of open_clip's tokenizers, "whitespace"
        (HTML escapes undone, single spaces) and "canonicalize" (also lower case and without
        punctuation, underscores as spaces); "siglip", Hugging Face's of SigLIP: lower case, without
        punctuation, single spaces.
    """
    text = whole(text)
    if cleaning == "none":
        return text
    if cleaning == "clip_lite":
        return clean_caption(text)
    if cleaning == "siglip":
        return _single_spaces(text.lower().translate(_PUNCTUATION))
    text = _single_spaces(unescape(text))
    if cleaning == "canonicalize":
        text = _single_spaces(text.replace("_", " ").translate(_PUNCTUATION).lower())
    return text


def unescape(text: str) -> str:
    """Undoes HTML escapes, twice, as CLIP does: web captions are often escaped twice."""
    return html.unescape(html.unescape(text)) if "&" in text else text


def check_cleaning(cleaning: str) -> None:
    """Raises UserError unless `cleaning` is one of CLEANINGS, naming the nearest."""
    choose("model.text.cleaning", cleaning, CLEANINGS)


def usable(texts: Iterable[str] | None, cleaning: str = "none") -> tuple[str, ...]:
    """Texts, cleaned by `clean`, without runs of white space, repetitions and empty ones.

    Args:
      texts: captions or tags; None is none.
      cleaning: one of CLEANINGS.
    """
    if not texts:
        return ()
    cleaned = [_single_spaces(clean(text, cleaning)) for text in texts]
    return tuple(dict.fromkeys(filter(None, cleaned)))


def _single_spaces(text: str) -> str:
    return " ".join(text.split())


def compose(
    captions: Sequence[str],
    tags: Sequence[str],
    caption_config: ConfigDict | Mapping[str, float],
    rng: np.random.Generator,
) -> str:
    """The caption of one visit to a record.

    Args:
      captions: at least one; the first is the main one.
      tags: words that may be added after a comma.
      caption_config: `config.data.caption`: the chances `first` (the first caption is taken; else
        any of them, all alike), `tags`, `shuffle` (the parts change places) and `word_dropout`.
      rng: where chance comes from.
    """
    return _phrase(_choose(captions, caption_config, rng), tags, caption_config, rng)


def compose_two(
    captions: Sequence[str],
    tags: Sequence[str],
    caption_config: ConfigDict | Mapping[str, float],
    rng: np.random.Generator,
) -> tuple[str, str]:
    """Two captions of one visit to a record: the one of `compose`, and another.

    The second is any of the other captions, all alike, or the same where there is no other; tags,
    shuffle and word dropout are drawn anew for it. Arguments are those of `compose`.
    """
    first = _choose(captions, caption_config, rng)
    one = _phrase(first, tags, caption_config, rng)
    others = [caption for caption in captions if caption != first] or [first]
    second = others[rng.integers(len(others))]
    return one, _phrase(second, tags, caption_config, rng)


def _choose(
    captions: Sequence[str],
    caption_config: ConfigDict | Mapping[str, float],
    rng: np.random.Generator,
) -> str:
    if len(captions) > 1 and rng.random() >= caption_config["first"]:
        return captions[int(rng.integers(len(captions)))]
    return captions[0]


def _phrase(
    caption: str,
    tags: Sequence[str],
    caption_config: ConfigDict | Mapping[str, float],
    rng: np.random.Generator,
) -> str:
    """The caption with perhaps its tags, perhaps some words left out."""
    parts = [caption]
    if tags and rng.random() < caption_config["tags"]:
        parts += tags
    if len(parts) > 1 and rng.random() < caption_config["shuffle"]:
        parts = [parts[index] for index in rng.permutation(len(parts))]
    text = ", ".join(parts)
    words = text.split()
    if caption_config["word_dropout"] and words:
        kept = rng.random(len(words)) >= caption_config["word_dropout"]
        kept[rng.integers(len(words))] = True
        text = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
    return text


def swap_sides(text: str) -> str:
    """The caption of the mirrored image: "left" and "right" change places, as whole words."""
    return _SIDES.sub(_other_side, text)


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
