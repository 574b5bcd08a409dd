"""Read SQuAD v1.1 and v2.0 files, answer their questions, and score the answers by the official rules.

The formats are those of Rajpurkar et al. 2016 (v1.1) and 2018 (v2.0). Exact match and F1 follow the evaluation scripts
published with both versions.
"""

import json
import re
import reprlib
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bertqa.errors import InvalidArgument
from bertqa.spans import MAX_ANSWER_TOKENS, Decoded, Logits, decode
from bertqa.windows import Window, WindowTokenizer, check_unicode


@dataclass(frozen=True, slots=True)
class Reference:
    """One annotator's answer; ``context[start:start + len(text)] == text``."""

    text: str
    start: int  # first code point in the context


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a SQuAD file."""

    id: str
    title: str  # of its article
    question: str
    context: str
    references: tuple[Reference, ...]  # empty where v2.0 calls the question impossible


@dataclass(frozen=True, slots=True)
class Score:
    """Exact match and F1 in percent, over ``total`` questions."""

    exact_match: float
    f1: float
    total: int


class MalformedSquad(ValueError):
    """The file is not in SQuAD format; the message names the file and the place in it."""


def read_squad(path: Path) -> list[Example]:
    """Read a SQuAD v1.1 or v2.0 file, in file order.

    Raises:
        MalformedSquad: the file is not JSON, a field is missing or has the wrong type, a question is blank, an id is
            repeated, or an answer is not at its ``answer_start``.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedSquad(f"{path}: not JSON ({error})") from error
    return list(_examples(document, str(path)))


def as_squad(examples: Iterable[Example]) -> dict[str, object]:
    """Convert examples to the JSON object of a SQuAD file, one article per title; `read_squad` reads it back."""
    articles: dict[str, dict[str, list[dict[str, object]]]] = {}
    for example in examples:
        answers = [{"text": reference.text, "answer_start": reference.start} for reference in example.references]
        entry: dict[str, object] = {"id": example.id, "question": example.question, "answers": answers}
        if not answers:
            entry["is_impossible"] = True
        articles.setdefault(example.title, {}).setdefault(example.context, []).append(entry)
    return {
        "version": "1.1",
        "data": [
            {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
            for title, paragraphs in articles.items()
        ],
    }


def _examples(document: object, path: str) -> Iterator[Example]:
    seen: dict[str, str] = {}  # id -> its place in the file
    for a, article in enumerate(_field(document, "data", list, path)):
        at = f"{path}: data[{a}]"
        title = _field(article, "title", str, at, default="")
        for p, paragraph in enumerate(_field(article, "paragraphs", list, at)):
            at_paragraph = f"{at}.paragraphs[{p}]"
            context = _field(paragraph, "context", str, at_paragraph)
            for q, entry in enumerate(_field(paragraph, "qas", list, at_paragraph)):
                at_question = f"{at_paragraph}.qas[{q}]"
                if (number := _field(entry, "id", str, at_question)) in seen:
                    raise MalformedSquad(f"{at_question}.id: {reprlib.repr(number)} is already used at {seen[number]}")
                seen[number] = at_question.removeprefix(f"{path}: ")
                question = _field(entry, "question", str, at_question)
                if all(unicodedata.category(character)[0] in "CZ" for character in question):
                    raise MalformedSquad(f"{at_question}.question: must contain visible text")
                impossible = _field(entry, "is_impossible", bool, at_question, default=False)
                answers = [] if impossible else _field(entry, "answers", list, at_question)
                yield Example(
                    id=number,
                    title=title,
                    question=question,
                    context=context,
                    references=tuple(
                        _reference(answer, context, f"{at_question}.answers[{n}]") for n, answer in enumerate(answers)
                    ),
                )


def _reference(answer: object, context: str, at: str) -> Reference:
    text = _field(answer, "text", str, at)
    start = _field(answer, "answer_start", int, at)
    if start < 0 or not text or not context.startswith(text, start):
        raise MalformedSquad(f"{at}: the context does not contain {reprlib.repr(text)} at character {start}")
    return Reference(text, start)


_MISSING = object()


def _field(holder: object, name: str, kind: type, at: str, default: object = _MISSING) -> Any:
    """Return a field of a parsed JSON object after checking its type; the return type is Any because JSON has none."""
    if not isinstance(holder, dict):
        raise MalformedSquad(f"{at}: must be an object")
    value = holder.get(name, default)
    if value is _MISSING:
        raise MalformedSquad(f"{at}: the field {name!r} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MalformedSquad(f"{at}.{name}: must be of type {kind.__name__}")
    if isinstance(value, str):
        try:
            check_unicode(name, value)
        except InvalidArgument as error:
            raise MalformedSquad(f"{at}.{name}: {error.reason}") from None
    return value


Predict = Callable[[Window], Logits]
"""Runs the model on one window. Takes tensors of shape (1, length); returns start and end logits of that shape."""


def answer_all(
    examples: Iterable[Example],
    tokenizer: WindowTokenizer,
    predict: Predict,
    *,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    null_threshold: float = 0.0,
) -> Iterator[tuple[Example, Decoded]]:
    """Answer every question of a SQuAD file with any runtime, lazily and in order, one window at a time."""
    for example in examples:
        windows = tokenizer(example.question, example.context)
        logits = [predict(window) for window in windows.windows]
        yield (
            example,
            decode([windows], [logits], max_answer_tokens=max_answer_tokens, null_threshold=null_threshold),
        )


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> Score:
    """Compute exact match and F1 of predicted texts, keyed by question id; an empty text means "no answer".

    Each question is scored against its best reference. A question without references is right if the prediction is
    empty, as in the v2.0 script. A question without a prediction counts as wrong, as in the v1.1 script.

    Raises:
        ValueError: ``examples`` is empty.
    """
    if not examples:
        raise ValueError("nothing to score: there are no examples")
    exact_matches = f1s = 0.0
    for example in examples:
        predicted = predictions.get(example.id)
        if predicted is None:
            continue
        texts = [reference.text for reference in example.references] or [""]
        exact_matches += max(exact_match(predicted, text) for text in texts)
        f1s += max(f1(predicted, text) for text in texts)
    return Score(100 * exact_matches / len(examples), 100 * f1s / len(examples), len(examples))


def score_by_kind(examples: Sequence[Example], predictions: Mapping[str, str]) -> dict[str, float]:
    """Return what the official SQuAD v2.0 script prints, under its names: ``exact``, ``f1`` and ``total``.

    The names without a prefix cover all questions; ``HasAns_`` and ``NoAns_`` cover those with and without an answer,
    and are left out if there are none. Like the script, this drops references that are only articles and punctuation.

    Raises:
        ValueError: ``examples`` is empty.
    """
    examples = [
        replace(example, references=tuple(r for r in example.references if normalize(r.text))) for example in examples
    ]
    report: dict[str, float] = {}
    for prefix, chosen in (
        ("", examples),
        ("HasAns_", [example for example in examples if example.references]),
        ("NoAns_", [example for example in examples if not example.references]),
    ):
        if chosen or not prefix:
            result = score(chosen, predictions)
            report |= {f"{prefix}exact": result.exact_match, f"{prefix}f1": result.f1, f"{prefix}total": result.total}
    return report


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Convert to lower case and remove ASCII punctuation, English articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, reference: str) -> float:
    """Return 1.0 if both texts are equal after normalization, else 0.0."""
    return float(normalize(predicted) == normalize(reference))


def f1(predicted: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over the bags of normalized words, in [0, 1]."""
    predicted_words, reference_words = normalize(predicted).split(), normalize(reference).split()
    if not predicted_words or not reference_words:
        return float(predicted_words == reference_words)
    shared = (Counter(predicted_words) & Counter(reference_words)).total()
    return 2 * shared / (len(predicted_words) + len(reference_words))
