"""What is asked, and what becomes of it step by step: `Question`, `Tokenized`, `Inferred`, `Result`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from sys import getsizeof

from bertqa.errors import InvalidArgument, Location
from bertqa.spans import MAX_ANSWER_TOKENS, Answer, Decoded, Logits
from bertqa.windows import Window, Windows
from service.inference.registry import ServedModel
from service.inference.shared_values import Source
from service.settings import Settings

_ARRAY_BYTES, _WINDOW_BYTES, _ANSWER_BYTES = 160, 1_200, 320  # of the objects themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and of whom; None stands for the model's own value. Field names are those that errors give."""

    model: ServedModel
    question: str
    contexts: tuple[str, ...]
    top_k: int = 1
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    overlap: int | None = None  # tokens
    max_seq_len: int | None = None  # tokens
    max_question_tokens: int | None = None
    align_to_words: bool = True
    location: Location = field(default=(), compare=False)  # of the question in the client's request, for errors

    @property
    def chars(self) -> int:
        """Characters of all contexts."""
        return sum(map(len, self.contexts))

    @property
    def bytes(self) -> int:
        """Memory of its texts: one byte a character to four, by the widest that a text holds."""
        return getsizeof(self.question) + sum(map(getsizeof, self.contexts))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A question ready for the engine."""

    question: Question
    documents: tuple[Windows, ...]  # one for each context
    seconds: float
    cost_s: float  # seconds that work on its texts may take at worst, as `tokenizing_s` estimates

    @property
    def windows(self) -> int:
        """Engine calls that the question needs."""
        return sum(len(document.windows) for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of all contexts."""
        return sum(len(document.starts) for document in self.documents)

    @property
    def bytes(self) -> int:
        """Memory of its windows, and of the logits that will come of them."""
        windows = [window for document in self.documents for window in document.windows]
        arrays = [array for each in self.documents for array in (each.starts, each.ends, each.words)]
        size = sum(array.nbytes + _ARRAY_BYTES for array in arrays)
        return size + sum(_bytes_with_logits(window) for window in windows) + 2_048


def _bytes_with_logits(window: Window) -> int:
    return window.length * (3 + 2) * 4 + _WINDOW_BYTES  # three int32 of each token go in, two float32 come out


@dataclass(frozen=True, slots=True)
class Inferred:
    """A question with the engine's answer."""

    tokenized: Tokenized
    logits: Sequence[Sequence[Logits]]  # for each document, of each of its windows
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """A question answered."""

    tokenized: Tokenized
    logits: Sequence[Sequence[Logits]]  # for each document, of each of its windows
    decoded: Decoded
    tokenize_s: float
    infer_s: float
    decode_s: float
    omitted: int = 0  # answers left out, for the bytes of all would be more than `MAX_ANSWER_BYTES`
    source: Source | None = None  # None without a cache

    @property
    def question(self) -> Question:
        """What was asked."""
        return self.tokenized.question

    @property
    def documents(self) -> tuple[Windows, ...]:
        """Its windows over each of its contexts."""
        return self.tokenized.documents

    @property
    def bytes(self) -> int:
        """Memory that it takes up, its key in a cache included."""
        answers = sum(getsizeof(each.text) + _ANSWER_BYTES for each in self.decoded.answers)
        return self.question.bytes + self.tokenized.bytes + answers

    def within(self, max_bytes: int) -> "Result":
        """The same with no more answers than have so many UTF-8 bytes together, but at least one."""
        kept: list[Answer] = []
        for answer in self.decoded.answers:
            max_bytes -= len(answer.text.encode())
            if kept and max_bytes < 0:
                break
            kept.append(answer)
        if len(kept) == len(self.decoded.answers):
            return self
        omitted = self.omitted + len(self.decoded.answers) - len(kept)
        return replace(self, decoded=replace(self.decoded, answers=tuple(kept)), omitted=omitted)


def validate(questions: Iterable[Question], settings: Settings) -> None:
    """Hold questions against the limits, before anything is made of them.

    Raises:
        InvalidArgument: a text is empty or too long, or there are too many.
    """
    for question in questions:
        try:
            _validate(question, settings)
        except InvalidArgument as error:
            raise error.within(*question.location) from None


def _validate(question: Question, settings: Settings) -> None:
    if len(question.question) > settings.max_question_chars:
        raise _too_many("question", settings.max_question_chars, "characters", len(question.question))
    if len(question.contexts) > settings.max_contexts:
        raise _too_many("contexts", settings.max_contexts, "texts", len(question.contexts))
    if question.chars > settings.max_context_chars:
        raise _too_many("contexts", settings.max_context_chars, "characters together", question.chars)
    if not question.question or question.question.isspace():
        raise InvalidArgument(("question",), _EMPTY)
    for number, context in enumerate(question.contexts):
        if not context or context.isspace():
            raise InvalidArgument(("contexts", number), _EMPTY)


_EMPTY = "must hold more than white space"


def _too_many(name: str, limit: int, unit: str, got: int) -> InvalidArgument:
    return InvalidArgument((name,), f"must be at most {limit:,} {unit}; got {got:,}")
