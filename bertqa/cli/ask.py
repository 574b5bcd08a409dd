"""``bertqa ask``: ask a running service one question."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group, say
from bertqa.cli.service_client import ServiceOptions

if TYPE_CHECKING:
    from bertqa.client import AnswerRequest

app = group("Ask one question about a text.")


@dataclass(frozen=True, kw_only=True)
class AskOptions(ServiceOptions):
    """Options of ``bertqa ask``."""

    question: Annotated[str, typer.Argument(help="Question to ask.")]
    context: Annotated[str, typer.Option(metavar="FILE", help="File with the text, in UTF-8; - reads standard input.")]
    top_k: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Number of answers to print.")] = 1
    guess: Annotated[
        bool, typer.Option("--guess", help="Print the best guess even if the text does not seem to have an answer.")
    ] = False


@command(app, AskOptions, extra="cli")
def ask(options: AskOptions) -> int:
    """Ask one question about a text.

    Prints one line per answer: the score, the character offsets in the text, and the answer. If the text does not seem
    to have an answer, prints nothing on standard output and ends with exit code 1. The API key is read from
    BERTQA_API_KEY.
    """
    context = _read_text(options.context)
    request: AnswerRequest = {"question": options.question, "context": context, "top_k": options.top_k}
    with options.client() as client:
        reply = client.answer(request)
    if options.format == "json":
        print(json.dumps(reply, ensure_ascii=False, indent=2))
    elif reply["has_answer"] or options.guess:
        for answer in reply["answers"]:
            print(f"{answer['score']:.3f}  {answer['start']}-{answer['end']}  {answer['text']}")
    if not reply["has_answer"]:
        say("no answer: the text does not seem to answer this")
        return Exit.OK if options.guess else Exit.NO
    return Exit.OK


def _read_text(path: str) -> str:
    try:
        # bytes, so that neither the locale nor new line conversion moves the offsets
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--context {path}: {error}") from error
