"""Odd inputs by the thousand: good ones in which one place or two hold what breaks readers.

Each is made by a random generator of its own, from its test's name and its number: the same on
every machine. A library that also shrinks them takes 4 to 13 ms to draw one, this 0.1 ms.

MLIP_FUZZ_EXAMPLES=N has each test meet N of them, and MLIP_FUZZ_FIRST=N begins at number N.
"""

import contextlib
import copy
import json
import os
import random
import resource
import signal

import pytest

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import MOST_TEXT

FEW, MANY = 500, 20_000
EXAMPLES = pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
IMAGE = b"an image, which no reader looks at"
LONGEST = 2000  # characters of a message
SECONDS = 60  # an example that takes so long hangs, on the slowest machine
MEMORY = 1000 * 2**10  # KiB that the examples of a test may add to what the process once had

# What breaks readers: marks, separators, breaks, halves of characters, other alphabets, paths.
WORDS = (
    *("", " ", "a", "dog", "\0", "\n", "\r\n", "\r", '"', '""', ",", "\t", "{", "\\", "'"),
    *("\ud83d", "\udce9", "é", "你好", "\u2028", "\ufeff", "\u202e", "<b>", "%s", "$(x)"),
    *("../x", "../outside/victim", "/etc/passwd", "/dev/zero", "0.png", "1.png", "train"),
    *("holdout", "null", "nan", "1e999", "-1", "²", "١"),
)
LONG = ("x" * 300, "x" * 5000, "x" * (MOST_TEXT + 1))
NUMBERS = (
    *(0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, 5e-324),
    *(float("inf"), float("nan"), -0.0, 1.0),
)
# What json.dumps does not write.
RAW = (
    *("1" * 5000, "[" * 5000, '{"a":' * 5000, "1e400", "NaN", "-", "tru", "{", "", "01"),
    *('"\\ud83d"', '"\\u0000"', '{"a":1,"a":2}', '"\t"', "/* */ 1", "'a'"),
)


class Odd(random.Random):
    """Draws odd values."""

    def once_in(self, times):
        return self.random() * times < 1

    def text(self):
        if self.once_in(30):
            return self.choice(LONG)
        return "".join(self.choices(WORDS, k=self.randrange(5)))

    def leaf(self):
        kind = self.randrange(8)
        if kind < 4:
            return self.text()
        if kind < 6:
            return self.choice(NUMBERS)
        return self.choice((None, True, False))

    def value(self, depth=3):
        """Anything that JSON can hold."""
        kind = self.randrange(10) if depth else 0
        if kind < 7:
            return self.leaf()
        if kind == 7:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        if kind == 8:
            return {self.text(): self.value(depth - 1) for _ in range(self.randrange(4))}
        levels = self.choice((60, 99, 101, 300))
        return json.loads("[" * levels + "]" * levels)

    def like(self, value):
        """A value beside one that is there: of its kind, but odd."""
        if isinstance(value, bool) or value is None:
            return self.choice((True, False, None, 0, 1))
        if isinstance(value, int):
            return self.choice((0, -1, 1, value + 1, -value, value * 10**6, 1.0, 0.5))
        if isinstance(value, float):
            return self.choice((0.0, -value, value * 1e9, float("nan"), 1, 0))
        if isinstance(value, str):
            return self.choice((value + self.text(), value[:-1], value.upper(), self.text()))
        if isinstance(value, list | tuple):
            value = list(value)
            more = [self.choice(value)] if value else [self.leaf()]
            return self.choice(([], value[1:], value + more, value * 50))
        return dict(list(value.items())[1:])

    def changed(self, good, changes, words=()):
        """The text of a JSON value with some places changed, left out or added.

        Args:
          good: a list or an object.
          changes: how many places, at most.
          words: texts that mean something there.
        """
        value = json.loads(json.dumps(good))
        for _ in range(self.randint(1, changes)):
            value = self._change(value, words)
        text = json.dumps(value)
        if self.once_in(8):
            at = [index for index, letter in enumerate(text) if letter in ":,["]
            place = self.choice(at) + 1 if at else 0
            text = text[:place] + self.choice(RAW) + text[place + self.randrange(3) :]
        if self.once_in(16):
            text = text[: self.randrange(len(text) + 1)]
        return text

    def _change(self, value, words):
        if self.once_in(40) or not value or not isinstance(value, (dict, list)):
            return self.value()
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = self.choice(keys)
            inner = node[key]
            if not (isinstance(inner, (dict, list)) and inner) or self.once_in(5):
                break
            node = inner
        way = self.randrange(8)
        if way == 0:
            del node[key]
        elif way == 1 and isinstance(node, dict):
            node[str(self.choice(words)) if words and self.once_in(2) else self.text()] = inner
        elif way < 4:
            node[key] = self.like(inner)
        elif way < 5 and words:
            node[key] = copy.deepcopy(self.choice(words))  # it may be changed in its turn
        else:
            node[key] = self.value()
        return value

    def damaged(self, data):
        """Bytes of which some are cut off, flipped, repeated or zero."""
        data = bytearray(data)
        for _ in range(self.randint(1, 2)):
            way = self.randrange(6)
            place = self.randrange(len(data)) if data else 0
            if way == 0:
                del data[place:]
            elif way == 1 and data:
                data[place] ^= 1 << self.randrange(8)
            elif way == 2 and data:  # near the beginning, where lengths stand
                data[self.randrange(min(len(data), 16))] = self.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif way == 3:
                data[place : place + self.randrange(64)] = b""
            elif way == 4:
                data += data[place:]
            else:
                data[place:] = bytes(len(data) - place)
        return bytes(data)


def meet(name, make, check, examples):
    """Has a check meet examples, always the same, each within bounds.

    Args:
      name: of what is met.
      make: of an `Odd`, gives an example.
      check: raises where the property does not hold.
      examples: how many, unless the environment says it.
    """
    first = int(os.environ.get("MLIP_FUZZ_FIRST", "0"))
    examples = int(os.environ.get("MLIP_FUZZ_EXAMPLES", examples))
    before = _most_memory()
    with _ended_in_time() as begin:
        for number in range(first, first + examples):
            example = make(Odd(f"{name} {number}"))
            begin()
            try:
                check(example)
            except BaseException as error:
                error.add_note(f"{name}, example {number}: {repr(example)[:3000]}")
                raise
    assert _most_memory() - before < MEMORY, f"{name} took much memory"


def _most_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _ended_in_time():
    def late(*_):
        raise TimeoutError(f"an example takes more than {SECONDS} s")

    former = signal.signal(signal.SIGALRM, late)
    try:
        yield lambda: signal.alarm(SECONDS)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def said(error):
    """That a message is one line that can be printed, and not an essay."""
    message = str(error)
    assert message and len(message) < LONGEST and "\n" not in message, message[:LONGEST]
    assert "Traceback" not in message
    message.encode("utf-8")
    return True


def gives(function, *arguments, **options):
    """What a function gives, or None where it says in a line why not."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        said(error)
    return None


@pytest.fixture
def watched(tmp_path):
    """Files that look like images; a file outside, and everything inside, stays as it is."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "victim").write_text("as it was")
    for number in range(10):
        (inside / f"{number}.png").write_bytes(IMAGE)
    yield inside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_text() == "as it was"
    for number in range(10):
        assert (inside / f"{number}.png").read_bytes() == IMAGE
