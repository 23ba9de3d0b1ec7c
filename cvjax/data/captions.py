"""Captions as numbers: one for each word, 0 where there is none."""

from collections.abc import Sequence

import numpy as np

from cvjax.errors import InputError, nearest


def encode(caption: str, words: Sequence[str], length: int) -> np.ndarray:
    """The words of a caption as int32 [length]: `words[i]` is i + 1, and 0 follows the last.

    A comma is a word. Raises InputError for a word that is not in the vocabulary `words`, or for
    more than `length` of them.
    """
    said = caption.lower().replace(",", " , ").split()
    if len(said) > length:
        raise InputError(f"caption {caption!r} has {len(said)} words; {length} is the most")
    tokens = np.zeros(length, np.int32)
    for place, word in enumerate(said):
        if word not in words:
            raise InputError(
                f"caption {caption!r}: the word {word!r} is unknown{nearest(word, words)}"
            )
        tokens[place] = list(words).index(word) + 1
    return tokens


def decode(tokens: Sequence[int], words: Sequence[str]) -> str:
    """The caption of tokens: the inverse of `encode`, up to spaces and capitals."""
    return " ".join(words[token - 1] for token in tokens if token).replace(" ,", ",")
