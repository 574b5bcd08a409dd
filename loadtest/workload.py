"""Choose the requests of a load test and their times: real questions, several shapes of text, repeated or not.

Repetition is the one property of a load that decides what a cache is worth, so it is chosen: `repeat="zipf"` draws the
same requests again and again, the n-th of them n times as rarely as the first; `repeat="unique"` asks nothing twice,
and yet every answer is known beforehand: see `mark`.
"""

import itertools
import json
import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bertqa.squad import Example

Kind = Literal["short", "long", "several"]
"""``short``: one paragraph. ``long``: paragraphs joined to one text. ``several``: each paragraph is a text."""
Repeat = Literal["unique", "zipf"]

LONG_CHARS = (2_000, 100_000)
"""Characters of a long text; the logarithm is uniform."""
SEVERAL = (2, 8)
"""Number of texts of a request of the kind ``several``."""
ZIPF_EXPONENT = 1.0
"""Zipf's own; measured for requests to web proxies: 0.64 to 0.83 (Breslau et al. 1999, INFOCOM)."""

_BLANKS = " \t\n\r"
_MARK_CHARS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """The best answer of a reply: ``contexts[context_index][start:end] == text``."""

    text: str
    start: int
    end: int
    context_index: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    kind: Kind
    question: str
    contexts: tuple[str, ...]
    answer: Answer | None = None  # of an undisturbed service; None if not asked yet

    def body(self, mark: str = "") -> str:
        """The JSON, with a mark after the last text."""
        *others, last = self.contexts
        texts: dict[str, Any] = (
            {"contexts": [*others, last + mark]} if self.kind == "several" else {"context": last + mark}
        )
        return json.dumps({"question": self.question, **texts})


def mark(number: int) -> str:
    """White space that spells a number below 4 ** 24.

    After a text it changes neither its tokens nor its answer, but a cache that compares texts sees a different one.
    """
    return "".join(_BLANKS[number >> 2 * place & 3] for place in range(_MARK_CHARS))


def make_requests(examples: Sequence[Example], kind: Kind, count: int, seed: int = 0) -> list[Asked]:
    """Make requests of one kind; the text of each question contains its own paragraph.

    Args:
        examples: of a SQuAD file.
        kind: of all of them.
        count: how many; if there are fewer questions, they repeat with other texts.
        seed: of all choices.
    """
    choose = random.Random(f"{kind} {seed}")
    paragraphs = list(dict.fromkeys(example.context for example in examples))
    order = choose.sample(examples, len(examples))
    return [
        Asked(kind, example.question, _texts(kind, example.context, paragraphs, choose))
        for example in itertools.islice(itertools.cycle(order), count)
    ]


def _texts(kind: Kind, own: str, paragraphs: Sequence[str], choose: random.Random) -> tuple[str, ...]:
    if kind == "short":
        return (own,)
    if kind == "several":
        texts = [own, *choose.sample(paragraphs, min(choose.randint(*SEVERAL), len(paragraphs)) - 1)]
        choose.shuffle(texts)
        return tuple(texts)
    least, most = LONG_CHARS
    limit = int(least * (most / least) ** choose.random())
    joined, chars = [own], len(own)
    for other in itertools.cycle(choose.sample(paragraphs, len(paragraphs))):
        if chars + 2 + len(other) > limit:
            break
        joined.append(other)
        chars += 2 + len(other)
    choose.shuffle(joined)
    return ("\n\n".join(joined),)


class Draw:
    """Draws endless requests: first a kind by its weight, then one of that kind. Not thread-safe."""

    def __init__(self, asked: Sequence[Asked], weights: Mapping[Kind, float], repeat: Repeat, seed: int) -> None:
        """Prepare the draw.

        Args:
            asked: all that may be drawn; where repetition is Zipf's, the first of a kind is its most frequent one.
            weights: of the kinds, relative to each other.
            repeat: how often the same request comes.
            seed: of the choices; two processes need two, or they ask the same at the same time.

        Raises:
            ValueError: a kind with a weight has no request.
        """
        self._choose = random.Random(seed)
        self._kinds = [kind for kind, weight in weights.items() if weight > 0]
        self._weights = [weights[kind] for kind in self._kinds]
        self._asked = {kind: [each for each in asked if each.kind == kind] for kind in self._kinds}
        for kind, requests in self._asked.items():
            if not requests:
                raise ValueError(f"weights: there is no request of the kind {kind}")
        self._repeat = repeat
        self._shares = {kind: zipf_shares(len(requests)) for kind, requests in self._asked.items()}
        self._turn = {kind: self._choose.randrange(len(requests)) for kind, requests in self._asked.items()}
        # Random, so that no earlier run has filled the cache of the service with the same texts.
        self._mark = itertools.count(random.SystemRandom().randrange(4 ** (_MARK_CHARS - 1)))

    def __iter__(self) -> "Draw":
        return self

    def __next__(self) -> tuple[Asked, str]:
        """The next request and its body."""
        (kind,) = self._choose.choices(self._kinds, self._weights)
        requests = self._asked[kind]
        if self._repeat == "zipf":
            asked = requests[bisect(self._shares[kind], self._choose.random())]
            return asked, asked.body()
        self._turn[kind] = (self._turn[kind] + 1) % len(requests)
        asked = requests[self._turn[kind]]
        return asked, asked.body(mark(next(self._mark)))


def zipf_shares(count: int) -> list[float]:
    """The cumulative share of draws for each rank; the share of rank n alone is n ** -exponent / sum."""
    sums = list(itertools.accumulate(rank**-ZIPF_EXPONENT for rank in range(1, count + 1)))
    return [each / sums[-1] for each in sums[:-1]] + [1.0]


def due_times(rate: float, seed: int) -> Iterator[float]:
    """Endless seconds at which requests are due: a Poisson process, as many independent clients make.

    Several of them with different seeds together are one too, at the sum of their rates.
    """
    draw, due = random.Random(seed), 0.0
    while True:
        due += draw.expovariate(rate)
        yield due


def parse_mix(text: str) -> dict[Kind, float]:
    """Read weights such as ``short=8,long=1``; a kind alone weighs 1.

    Raises:
        ValueError: an unknown kind, or no positive weight.
    """
    weights: dict[Kind, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        kind = next((kind for kind in get_args(Kind) if kind == name), None)
        if kind is None:
            raise ValueError(f"{name!r} is none of {', '.join(get_args(Kind))}")
        weights[kind] = float(weight or 1)
    if min(weights.values()) < 0 or not sum(weights.values()):
        raise ValueError(f"{text}: weights must be positive")
    return weights


def write_requests(path: Path, asked: Sequence[Asked]) -> None:
    """Write a request a line, with its answer."""
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in asked))


def read_requests(path: Path) -> list[Asked]:
    """Read what `write_requests` wrote."""
    return [
        Asked(
            line["kind"],
            line["question"],
            tuple(line["contexts"]),
            Answer(**line["answer"]) if line["answer"] else None,
        )
        for line in map(json.loads, path.read_text().splitlines())
    ]
