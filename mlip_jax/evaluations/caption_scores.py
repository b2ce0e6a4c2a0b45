"""How near written captions are to those that people wrote: CIDEr-D and BLEU-4, over all images.

Words are the letters and digits of a text in lower case, its punctuation left out. COCO's scores
are of Stanford's tokenizer, which needs Java, and differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORDS = re.compile(r"\w+(?:['’]\w+)*")
_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # words that the length may differ by, of CIDEr-D's Gaussian
_NGrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORDS.findall(text.lower())


def cider_d(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726, section 6): 0 to 10, the mean over the images.

    Weights of n-grams come from the references of all these images.

    Args:
      written: a caption of each image.
      references: what people wrote of it, at least one caption each.
    """
    of_references = [[_n_grams(words(text)) for text in texts] for texts in references]
    found_in: _NGrams = Counter()
    for texts in of_references:
        found_in.update(set().union(*texts))
    images = math.log(len(references)) if references else 0.0

    def weighed(counts: _NGrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for n_gram, count in counts.items():
            weight = images - math.log(max(1, found_in[n_gram]))
            vectors[len(n_gram) - 1][n_gram] = count * weight
        return vectors

    total = 0.0
    for text, texts in zip(written, of_references, strict=True):
        counts = _n_grams(words(text))
        one = weighed(counts)
        scores = [
            _similarity(one, weighed(other), _length(counts) - _length(other)) for other in texts
        ]
        total += 10.0 * sum(scores) / len(scores)
    return total / max(len(written), 1)


def bleu_4(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all captions together (Papineni et al. 2002), without smoothing: 0 to 1.

    The reference length of a caption is that of the reference nearest to it, as in COCO's code.

    Args:
      written: a caption of each image.
      references: what people wrote of it, at least one caption each.
    """
    right, total = [0] * _LONGEST, [0] * _LONGEST
    length = reference_length = 0
    for text, texts in zip(written, references, strict=True):
        counts = _n_grams(words(text))
        of_references = [_n_grams(words(other)) for other in texts]
        most: _NGrams = Counter()
        for other in of_references:
            most |= other
        for n_gram, count in (counts & most).items():
            right[len(n_gram) - 1] += count
        here = _length(counts)
        for n in range(_LONGEST):
            total[n] += max(here - n, 0)
        length += here
        lengths = [_length(other) for other in of_references]
        reference_length += min(lengths, key=lambda other: (abs(other - here), other))
    if not all(right):
        return 0.0
    precision = sum(math.log(r / t) for r, t in zip(right, total, strict=True)) / _LONGEST
    return math.exp(precision + min(0.0, 1.0 - reference_length / length))


def _n_grams(text: Sequence[str]) -> _NGrams:
    return Counter(
        tuple(text[start : start + n])
        for n in range(1, _LONGEST + 1)
        for start in range(len(text) - n + 1)
    )


def _length(counts: _NGrams) -> int:
    """Words of a text, of which these are the n-grams."""
    return sum(count for n_gram, count in counts.items() if len(n_gram) == 1)


def _similarity(
    one: list[dict[tuple[str, ...], float]], other: list[dict[tuple[str, ...], float]], longer: int
) -> float:
    """The mean over n of cosines of what is clipped to the reference, times the Gaussian."""
    cosines = 0.0
    for mine, theirs in zip(one, other, strict=True):
        product = sum(min(mine[key], theirs[key]) * theirs[key] for key in mine if key in theirs)
        norms = math.sqrt(sum(v * v for v in mine.values()) * sum(v * v for v in theirs.values()))
        cosines += product / norms if norms else product
    return cosines / _LONGEST * math.exp(-(longer**2) / (2 * _SIGMA**2))
