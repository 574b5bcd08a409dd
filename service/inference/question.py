"""A question and its later states: `Question`, `Tokenized`, `Inferred`, `Result`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from sys import getsizeof

from bertqa.errors import InvalidArgument, Location
from bertqa.spans import MAX_ANSWER_TOKENS, Answer, Decoded, Logits
from bertqa.windows import Window, Windows
from service.inference.registry import ServedModel
from service.inference.shared_values import Source
from service.settings import Settings

_ARRAY_BYTES, _WINDOW_BYTES, _ANSWER_BYTES = 160, 1_200, 320  # Python overhead of each object


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question to a model; None means the model's default. Errors use these field names."""

    model: ServedModel
    question: str
    contexts: tuple[str, ...]
    top_k: int = 1
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    overlap: int | None = None  # tokens
    max_seq_len: int | None = None  # tokens
    max_question_tokens: int | None = None
    align_to_words: bool = True
    location: Location = field(default=(), compare=False)  # of the question in the client's request; used in errors

    @property
    def chars(self) -> int:
        """Characters of all contexts."""
        return sum(map(len, self.contexts))

    @property
    def bytes(self) -> int:
        """Memory of its texts: one to four bytes per character, by the widest character of each text."""
        return getsizeof(self.question) + sum(map(getsizeof, self.contexts))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized question."""

    question: Question
    documents: tuple[Windows, ...]  # one for each context
    seconds: float
    cost_s: float  # worst case of the work on its texts in seconds, from `tokenizing_s`

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
        """Memory of its windows and of their logits."""
        windows = [window for document in self.documents for window in document.windows]
        arrays = [array for each in self.documents for array in (each.starts, each.ends, each.words)]
        size = sum(array.nbytes + _ARRAY_BYTES for array in arrays)
        return size + sum(_bytes_with_logits(window) for window in windows) + 2_048


def _bytes_with_logits(window: Window) -> int:
    return window.length * (3 + 2) * 4 + _WINDOW_BYTES  # per token, three int32 in and two float32 out


@dataclass(frozen=True, slots=True)
class Inferred:
    """A question with the logits of its windows."""

    tokenized: Tokenized
    logits: Sequence[Sequence[Logits]]  # for each window of each document
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """A question with its answers."""

    tokenized: Tokenized
    logits: Sequence[Sequence[Logits]]  # for each window of each document
    decoded: Decoded
    tokenize_s: float
    infer_s: float
    decode_s: float
    omitted: int = 0  # answers dropped to keep the call within `MAX_ANSWER_BYTES`
    source: Source | None = None  # None without a cache

    @property
    def question(self) -> Question:
        """The question."""
        return self.tokenized.question

    @property
    def documents(self) -> tuple[Windows, ...]:
        """Its windows over each context."""
        return self.tokenized.documents

    @property
    def bytes(self) -> int:
        """Memory of the result, including its key in a cache."""
        answers = sum(getsizeof(each.text) + _ANSWER_BYTES for each in self.decoded.answers)
        return self.question.bytes + self.tokenized.bytes + answers

    def within(self, max_bytes: int) -> "Result":
        """Return the result with only the first answers whose UTF-8 bytes fit into ``max_bytes``, but at least one."""
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
    """Check questions against the limits, before any other work.

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


_EMPTY = "must contain more than white space"


def _too_many(name: str, limit: int, unit: str, got: int) -> InvalidArgument:
    return InvalidArgument((name,), f"must be at most {limit:,} {unit}; got {got:,}")
