"""The data that the job and its worker processes exchange: parts, receipts and options."""

from dataclasses import dataclass

from bertqa.graphemes import OffsetUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive rows of an input file, and the file that their answers go to."""

    name: str  # of the output file
    source: str  # path of the input file
    first: int  # its first row in that file, from 0
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The outcome of a part."""

    name: str
    rows: int = 0
    errors: int = 0  # rows with an error
    sha256: str = ""  # of the output file
    stopped: str = ""  # why the job cannot continue; then nothing was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """The options for answering rows and for the columns of the output."""

    question_column: str
    context_column: str
    id_column: str | None
    max_answer_tokens: int
    no_answer: bool
    offset_unit: OffsetUnit
