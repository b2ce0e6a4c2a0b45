"""Texts of equal token ids."""

import numpy as np

from mlip_jax.data.text.equality import equal_ids
from mlip_jax.data.text.tokenizer import load_tokenizer


def test_texts_that_differ_in_case_or_beyond_the_cut_are_equal():
    tokenizer = load_tokenizer("clip_8k")
    texts = ["dog face", "cat", "Dog  FACE", "dog", "cat", "a b c d e f g", "a b c d e f h"]
    groups = equal_ids(tokenizer.encode(texts, 8))
    assert groups.dtype == np.int64
    assert groups.tolist() == [0, 1, 0, 2, 1, 3, 3]
    assert equal_ids(tokenizer.encode(texts, 12)).tolist() == [0, 1, 0, 2, 1, 3, 4]


def test_rows_are_compared_whole():
    tokens = np.array([[1, 2, 0], [1, 2, 3], [0, 2, 0], [1, 2, 0]], np.int32)
    assert equal_ids(tokens).tolist() == [0, 1, 2, 0]
    assert equal_ids(tokens[:, ::-1]).tolist() == [0, 1, 2, 0]  # not contiguous
    assert equal_ids(tokens[:0]).tolist() == []
