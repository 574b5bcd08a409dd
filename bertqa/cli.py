"""The ``bertqa`` command.

``serve``, ``models``, ``batch``, ``keys`` and ``doctor`` are jobs of the service; ``ask`` and ``evaluate`` are HTTP
clients of a running one, with the API key in ``BERTQA_API_KEY`` where it needs one.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from bertqa.squad import Example, MalformedSquad, read_squad, score

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_NO_ANSWER, EXIT_ERROR = 1, 2


class CommandError(Exception):
    """Ends the command with a plain sentence on standard error."""


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what follows a job of the service is left to that."""
    parser = argparse.ArgumentParser(prog="bertqa", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    for name, module, text in (
        ("serve", "service", "start Triton and the REST service"),
        ("models", "service.commands.models", "put another version of a model into service, and take it back"),
        ("batch", "service.batch", "answer every row of Parquet files"),
        ("keys", "service.keys", "make API keys, and list those that there are"),
        ("doctor", "service.commands.doctor", "look for what would go wrong, and say how to fix it"),
    ):
        command = commands.add_parser(name, help=text, add_help=False)
        command.set_defaults(run=run_module, module=module)

    ask = commands.add_parser("ask", help="ask one question about a text")
    ask.add_argument("question")
    ask.add_argument("--context", required=True, metavar="FILE", help="the text, UTF-8; - reads standard input")
    ask.add_argument("--top-k", type=int, default=1, help="number of answers")
    ask.add_argument("--no-answer", action="store_true", help="allow that the text does not answer the question")
    ask.add_argument("--json", action="store_true", help="print the service's whole reply")
    ask.set_defaults(run=run_ask)

    evaluate = commands.add_parser("evaluate", help="measure EM and F1 through the served HTTP path")
    evaluate.add_argument("--data", type=Path, required=True, help="SQuAD file, v1.1 or v2.0")
    evaluate.add_argument("--limit", type=int, help="only the first so many questions")
    evaluate.add_argument("--concurrency", type=int, default=4, help="requests in flight")
    evaluate.add_argument("--min-f1", type=float, help="fail below this F1, in percent")
    evaluate.set_defaults(run=run_evaluate)
    for command in (ask, evaluate):
        command.add_argument("--url", default=os.environ.get("BERTQA_URL", DEFAULT_URL), help="of the service")
        command.add_argument("--timeout", type=float, default=60.0, help="seconds for one request")

    args, rest = parser.parse_known_args(argv)
    for name in ("limit", "concurrency"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            parser.error(f"--{name}: must be at least 1, not {value}")
    if rest and args.run is not run_module:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    args, rest = parse_args(argv)
    try:
        status = args.run(args, rest)
    except CommandError as error:
        print(f"bertqa: {error}", file=sys.stderr)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def run_module(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    """Become a job of the service, in this very process so that signals reach it."""
    if importlib.util.find_spec("service") is None:
        raise CommandError(
            f"{args.command} runs from a checkout of the project: pip install -e '.[service,builder]' there"
        )
    os.execv(sys.executable, [sys.executable, "-m", args.module, *rest])


def run_ask(args: argparse.Namespace, _: list[str]) -> int:
    """Print the answers with their scores and places; status 1 where the text has none."""
    try:
        # bytes, so that neither the locale nor new line conversion moves the offsets
        raw = sys.stdin.buffer.read() if args.context == "-" else Path(args.context).read_bytes()
        context = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--context {args.context}: {error}") from error
    body = {"question": args.question, "context": context, "top_k": args.top_k, "no_answer": args.no_answer}
    with _Client(args) as client:
        reply = client.answer(body)
    if args.json:
        print(json.dumps(reply, ensure_ascii=False, indent=2))
    else:
        for answer in reply["answers"]:
            print(f"{answer['score']:.3f}  {answer['start']}-{answer['end']}  {answer['text']}")
        if not reply["has_answer"]:
            print("The text does not seem to answer this.", file=sys.stderr)
    return 0 if reply["answers"] else EXIT_NO_ANSWER


def run_evaluate(args: argparse.Namespace, _: list[str]) -> int:
    """Ask every question of a SQuAD file over HTTP and print EM and F1."""
    from tqdm import tqdm  # noqa: PLC0415 - `serve` and the core need no progress bar

    try:
        examples = read_squad(args.data)[: args.limit]
    except (OSError, MalformedSquad) as error:
        raise CommandError(f"--data: {error}") from error
    if not examples:
        raise CommandError(f"--data {args.data}: holds no question")
    # Only where the file has unanswerable questions (v2.0) may the service say that there is no answer.
    no_answer = any(not example.references for example in examples)

    with _Client(args) as client, ThreadPoolExecutor(args.concurrency) as pool:

        def predict(example: Example) -> tuple[str, str]:
            reply = client.answer({"question": example.question, "context": example.context, "no_answer": no_answer})
            return example.id, reply["answers"][0]["text"] if reply["answers"] else ""

        model = client.info()["model"]
        began = time.monotonic()
        try:
            predictions = dict(tqdm(pool.map(predict, examples), total=len(examples), unit="question"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        seconds = time.monotonic() - began
    result = score(examples, predictions)
    print(
        json.dumps(
            {
                "model": model,
                "data": args.data.name,
                "questions": result.total,
                "exact_match": round(result.exact_match, 2),
                "f1": round(result.f1, 2),
                "questions_per_second": round(result.total / seconds, 1),
            }
        )
    )
    if args.min_f1 is not None and result.f1 < args.min_f1:
        raise CommandError(f"F1 {result.f1:.2f} is below --min-f1 {args.min_f1}")
    return 0


class _Client:
    """One HTTP connection pool to the service; its errors become the service's own sentences."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import httpx  # noqa: PLC0415 - the core does without it
        except ImportError as error:
            raise CommandError("this command needs httpx: pip install 'bertqa[cli]'") from error
        self._httpx = httpx
        self._url = args.url
        try:
            # A proxy for the web cannot reach this machine's own loopback interface.
            local = httpx.URL(args.url).host in ("127.0.0.1", "localhost", "::1")
            key = os.environ.get("BERTQA_API_KEY")  # a flag could be read in the list of processes
            headers = {"authorization": f"Bearer {key}"} if key else {}
            self._client = httpx.Client(base_url=args.url, timeout=args.timeout, trust_env=not local, headers=headers)
        except httpx.InvalidURL as error:
            raise CommandError(f"--url {args.url}: {error}") from error

    def __enter__(self) -> "_Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._request("POST", "/v1/answer", body)

    def info(self) -> dict[str, Any]:
        return self._request("GET", "/info", None)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except self._httpx.HTTPError as error:
            raise CommandError(f"{self._url}: {error or type(error).__name__}; is `bertqa serve` running?") from error
        try:
            reply: dict[str, Any] = response.json()
        except ValueError as error:
            raise CommandError(f"{self._url}{path}: status {response.status_code}, not JSON") from error
        if response.is_error:
            raise CommandError(f"{reply.get('error', reply)} (status {response.status_code})")
        return reply


if __name__ == "__main__":
    main()
