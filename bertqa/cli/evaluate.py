"""``bertqa evaluate``: measure the answers of a running service on a SQuAD file."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group
from bertqa.cli.service_client import ServiceOptions

if TYPE_CHECKING:
    from bertqa.client import Client
    from bertqa.squad import Example

app = group("Measure the answers of a service on a SQuAD file.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ServiceOptions):
    """Options of ``bertqa evaluate``."""

    data: Annotated[Path, typer.Option(metavar="FILE", help="SQuAD file to read, v1.1 or v2.0.")]
    limit: Annotated[
        int | None, typer.Option(callback=at_least_one, metavar="N", help="Ask only the first N questions.")
    ] = None
    concurrency: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Number of requests in flight.")
    ] = 4
    min_f1: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="End with exit code 5 if F1 is below this.")
    ] = None


@command(app, EvaluateOptions, extra="cli")
def evaluate(options: EvaluateOptions) -> int:
    """Measure exact match and F1 of a running service.

    Asks every question of a SQuAD file over HTTP and prints both measures in percent. While the service is busy, it
    waits and retries, and prints how often. The API key is read from BERTQA_API_KEY.
    """
    from bertqa.squad import MalformedSquad, read_squad, score  # noqa: PLC0415

    try:
        examples = read_squad(options.data)[: options.limit]
    except (OSError, MalformedSquad) as error:
        raise CommandError(f"--data: {error}") from error
    if not examples:
        raise CommandError(f"--data {options.data}: has no questions")
    with options.client() as client:
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
    """Return the best answer by question id, "" for no answer; shows a progress bar only at a terminal."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    from tqdm import tqdm  # noqa: PLC0415

    # The service may say "no answer" only if the file has unanswerable questions (v2.0).
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
