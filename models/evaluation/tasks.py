"""Tasks of any length with known answers: the kinds of RULER, made offline.

A needle is a fact in a long text; variables are a chain of assignments to be followed;
words are the most frequent of a long list (Hsieh et al., 2024, arXiv:2404.06654).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("needle", "variables", "words")
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_CHAIN = 5  # variables of a chain
_COMMON, _OFTEN, _SELDOM = 5, 12, 2  # words to find, their repeats, and the others'


class Task(NamedTuple):
    """A question about a long text.

    Attributes:
      text: what there is to read.
      question: what is asked.
      beginning: how the answer begins.
      answers: what it must hold.
    """

    text: str
    question: str
    beginning: str
    answers: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Share of the answers that a text holds."""
        return sum(x.lower() in answer.lower() for x in self.answers) / len(
            self.answers
        )


def make(
    kind: str,
    *,
    length: int,
    depth: float,
    seed: int,
    count: Callable[[str], int],
    haystack: Sequence[str] = _FILLER,
) -> Task:
    """A task whose text, question and beginning have at most so many tokens.

    Args:
      kind: one of KINDS.
      length: the most tokens.
      depth: where the needle is, from 0 (the beginning) to 1; others ignore it.
      seed: of everything that is drawn.
      count: tokens of a text.
      haystack: sentences around needles and variables, taken in turn.

    Raises:
      ValueError: an unknown kind, a depth outside 0 to 1, or too few tokens for it.
    """
    if kind not in KINDS:
        raise ValueError(f"no task is called {kind}: choose from {', '.join(KINDS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie between 0 and 1, got {depth}")

    def of_size(size: int) -> Task:
        """Every size draws the same names and numbers."""
        generator = np.random.default_rng(seed)
        if kind == "needle":
            return _needle(generator, size, depth, haystack)
        if kind == "variables":
            return _variables(generator, size, haystack)
        return _words(generator, size)

    def fits(size: int) -> bool:
        task = of_size(size)
        return count(f"{task.text}\n{task.question}\n{task.beginning}") <= length

    if not fits(0):
        raise ValueError(
            f"{length} tokens are too few for a task of the kind {kind}: the shortest "
            "needs more; give larger --contexts"
        )
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return of_size(low)


def _needle(
    generator: np.random.Generator, size: int, depth: float, haystack: Sequence[str]
) -> Task:
    """One sentence with a number in it, among `size` others."""
    city, number = _name(generator), str(generator.integers(100_000, 1_000_000))
    fact = f"One of the special magic numbers for {city} is: {number}."
    sentences = _sentences(haystack, size)
    sentences.insert(round(depth * size), fact)
    asked = f"special magic number for {city} mentioned in the provided text"
    question = f"What is the {asked}?"
    return Task(" ".join(sentences), question, f"The {asked} is", (number,))


def _variables(
    generator: np.random.Generator, size: int, haystack: Sequence[str]
) -> Task:
    """Assignments, each from the one before, spread among `size` sentences."""
    names = tuple(_name(generator).upper()[:5] for _ in range(_CHAIN))
    number = str(generator.integers(10_000, 100_000))
    values = (number, *(f"VAR {name}" for name in names[:-1]))
    places = np.sort(generator.integers(0, size + 1, _CHAIN))
    sentences = _sentences(haystack, size)
    for shift, (place, name, value) in enumerate(
        zip(places, names, values, strict=True)
    ):
        sentences.insert(int(place) + shift, f"VAR {name} = {value}.")
    question = f"Find all variables that are assigned the value {number}."
    beginning = (
        f"According to the chain of variable assignments in the text above, {_CHAIN} "
        f"variables are assigned the value {number}, they are:"
    )
    return Task(" ".join(sentences), question, beginning, names)


def _words(generator: np.random.Generator, size: int) -> Task:
    """A numbered list in which a few words come back far more often than the others."""
    common = tuple(_name(generator) for _ in range(_COMMON))
    others = [_name(generator) for _ in range(size)]
    words = np.array([*common * _OFTEN, *others * _SELDOM])
    listed = generator.permutation(words)
    text = " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
    question = f"What are the {_COMMON} most common words in the above list?"
    beginning = f"The {_COMMON} words that appear most often in the list are:"
    return Task(text, question, beginning, common)


def _name(generator: np.random.Generator) -> str:
    """Three syllables that are no word."""
    letters = [generator.choice(list(kind)) for kind in (_CONSONANTS, _VOWELS) * 3]
    return "".join(str(letter) for letter in letters)


def _sentences(haystack: Sequence[str], number: int) -> list[str]:
    return [haystack[place % len(haystack)] for place in range(number)]
