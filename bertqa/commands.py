"""``bertqa ask`` and ``bertqa evaluate``: HTTP clients of a running service."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertqa.command import (
    CommandError,
    Exit,
    OutputFormat,
    at_least_one,
    command,
    group,
    positive,
    say,
)

if TYPE_CHECKING:
    from bertqa.client import AnswerRequest, Client
    from bertqa.squad import Example

ask_app = group("Ask one question about a text.")
evaluate_app = group("Measure the answers of a service on a SQuAD file.")


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Options of every client of the service."""

    url: Annotated[str, typer.Option(envvar="BERTQA_URL", metavar="URL", help="Address of the service.")] = (
        "http://127.0.0.1:8000"
    )
    timeout: Annotated[
        float,
        typer.Option(
            callback=positive,
            metavar="SECONDS",
            help="Give a question up after this time, which includes the waits while the service is busy.",
        ),
    ] = 60.0
    format: Annotated[OutputFormat, typer.Option(help="Print text for people or JSON for machines.")] = "text"

    def client(self) -> "Client":
        """A client of the service, with the API key in ``BERTQA_API_KEY`` where one is needed."""
        from bertqa.client import Client  # noqa: PLC0415 - needs httpx, which --help does without

        try:
            return Client(self.url, timeout_s=self.timeout, report=say)
        except ValueError as error:
            raise CommandError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class AskOptions(ServiceOptions):
    """Options of ``bertqa ask``."""

    question: Annotated[str, typer.Argument(help="The question.")]
    context: Annotated[str, typer.Option(metavar="FILE", help="File with the text, in UTF-8; - reads standard input.")]
    top_k: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Number of answers.")] = 1
    guess: Annotated[
        bool, typer.Option("--guess", help="Print the best guess even if the text does not seem to have an answer.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ServiceOptions):
    """Options of ``bertqa evaluate``."""

    data: Annotated[Path, typer.Option(metavar="FILE", help="SQuAD file, v1.1 or v2.0.")]
    limit: Annotated[
        int | None, typer.Option(callback=at_least_one, metavar="N", help="Ask only the first N questions.")
    ] = None
    concurrency: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Requests in flight.")] = 4
    min_f1: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="End with exit code 5 if F1 is below this.")
    ] = None


@command(ask_app, AskOptions, extra="cli")
def ask(options: AskOptions) -> int:
    """Ask one question about a text.

    Prints a line for each answer: score, place in the text in characters, and the answer. If the text does not seem to
    have an answer, it prints nothing on standard output and ends with exit code 1. The API key is read from
    BERTQA_API_KEY.
    """
    context = _read_text(options.context)
    request: AnswerRequest = {"question": options.question, "context": context, "top_k": options.top_k}
    with options.client() as client, _ClientErrors():
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


@command(evaluate_app, EvaluateOptions, extra="cli")
def evaluate(options: EvaluateOptions) -> int:
    """Measure exact match and F1 of a running service.

    Asks every question of a SQuAD file over HTTP and prints both measures, in percent. Waits and asks again while the
    service is busy, and counts how often. The API key is read from BERTQA_API_KEY.
    """
    from bertqa.squad import MalformedSquad, read_squad, score  # noqa: PLC0415

    try:
        examples = read_squad(options.data)[: options.limit]
    except (OSError, MalformedSquad) as error:
        raise CommandError(f"--data: {error}") from error
    if not examples:
        raise CommandError(f"--data {options.data}: holds no question")
    with options.client() as client, _ClientErrors():
        model = client.info()["model"]
        began = time.monotonic()
        predictions = _predictions(client, examples, options.concurrency)
        seconds = time.monotonic() - began
    result = score(examples, predictions)
    found: dict[str, Any] = {
        "model": model,
        "data": options.data.name,
        "questions": result.total,
        "exact_match": round(result.exact_match, 2),
        "f1": round(result.f1, 2),
        "questions_per_second": round(result.total / seconds, 1),
        "retries": client.retries,
        "seconds_waited": round(client.waited_s, 1),
    }
    if options.format == "json":
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name.replace('_', ' '):{width}}  {value}" for name, value in found.items()))
    if options.min_f1 is not None and result.f1 < options.min_f1:
        raise CommandError(f"F1 {result.f1:.2f} is below --min-f1 {options.min_f1}", Exit.BELOW)
    return Exit.OK


def _predictions(client: "Client", examples: "list[Example]", concurrency: int) -> dict[str, str]:
    """The best answer to each question by its id, "" where there is none; a progress bar only at a terminal."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    from tqdm import tqdm  # noqa: PLC0415

    # Only where the file has unanswerable questions (v2.0) may the service say that there is no answer.
    no_answer = any(not example.references for example in examples)

    def predict(example: "Example") -> tuple[str, str]:
        reply = client.answer({"question": example.question, "context": example.context, "no_answer": no_answer})
        return example.id, reply["answers"][0]["text"] if reply["answers"] else ""

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            answers = pool.map(predict, examples)
            return dict(tqdm(answers, total=len(examples), unit="question", disable=None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read_text(path: str) -> str:
    try:
        # bytes, so that neither the locale nor new line conversion moves the offsets
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--context {path}: {error}") from error


class _ClientErrors:
    """A context that turns failed calls into the sentence and the exit code of the command."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from bertqa.client import ClientError, Refused, Unreachable  # noqa: PLC0415

        if isinstance(error, ClientError):
            codes = {Refused: Exit.USAGE, Unreachable: Exit.UNREACHABLE}
            raise CommandError(str(error), codes.get(type(error), Exit.SERVER)) from error
