"""``bertqa batch``: answer every row of Parquet files.

This module is the command line and needs Typer alone; `job` does the work and needs the extra ``batch``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bertqa.cli.command import CommandError, Exit, addresses, at_least_one, command, group, not_negative, say
from bertqa.graphemes import OffsetUnit
from bertqa.manifest import MODEL_NAME
from bertqa.spans import MAX_ANSWER_TOKENS
from service.commands.options import PROJECT

app = group("Answer every row of Parquet files.")


def _answer_tokens(value: int) -> int:
    from service.api.schemas import LONGEST_ANSWER_TOKENS  # noqa: PLC0415 - needs pydantic, which --help does without

    if not 1 <= value <= LONGEST_ANSWER_TOKENS:
        raise typer.BadParameter(f"must be from 1 to {LONGEST_ANSWER_TOKENS}, not {value}")
    return value


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options of ``bertqa batch``."""

    input: Annotated[Path, typer.Option(metavar="PATH", help="Parquet file, or directory of *.parquet files.")]
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Output directory; that of an interrupted run resumes the run.")
    ]
    triton_url: Annotated[
        str | None,
        typer.Option(
            envvar="BERTQA_TRITON_URL",
            metavar="HOST:PORT",
            callback=addresses,
            show_default="127.0.0.1:8001, the Triton of `bertqa serve`",
            help="gRPC address of Triton, or several separated by commas.",
        ),
    ] = None
    repository: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            show_default="model_repository of the project",
            help="Model repository that Triton serves, or a copy of it.",
        ),
    ] = PROJECT / "model_repository"
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="Model to use; the job keeps the version that is active when it starts."),
    ] = MODEL_NAME
    question_column: Annotated[str, typer.Option(metavar="NAME", help="Input column with the questions.")] = "question"
    context_column: Annotated[str, typer.Option(metavar="NAME", help="Input column with the contexts.")] = "context"
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="rows are numbered by file",
            help="Input column to copy to the output.",
        ),
    ] = None
    max_answer_tokens: Annotated[
        int, typer.Option(callback=_answer_tokens, metavar="N", help="Longest answer, in tokens.")
    ] = MAX_ANSWER_TOKENS
    no_answer: Annotated[
        bool, typer.Option("--no-answer", help="Leave the answer null if the text does not seem to have one.")
    ] = False
    offset_unit: Annotated[OffsetUnit, typer.Option(help="Unit of the columns start and end.")] = "codepoint"
    workers: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Number of worker processes.")] = 1
    in_flight: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            show_default="BERTQA_MAX_IN_FLIGHT, or 64",
            help="Windows that each process has in flight at Triton.",
        ),
    ] = None
    part_rows: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            metavar="N",
            help="Rows of each output file; a resumed job starts an unfinished file again.",
        ),
    ] = 5_000
    patience: Annotated[
        float,
        typer.Option(
            callback=not_negative, metavar="SECONDS", help="Stop if the engine gives no answer for this time."
        ),
    ] = 600.0
    ray_address: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            show_default="a local cluster for this job",
            help="Ray cluster; its nodes must have the same files and Python environment.",
        ),
    ] = "local"


@command(app, BatchOptions, extra="batch")
def batch(options: BatchOptions) -> int:
    """Answer every row of Parquet files.

    Run the same command again to continue a job that ended early. Prints a summary as JSON.
    """
    from bertqa.manifest import BundleMismatch  # noqa: PLC0415
    from service.commands.batch.errors import BatchRefused, BatchStopped  # noqa: PLC0415
    from service.commands.batch.job import run  # noqa: PLC0415

    try:
        summary = run(options)
    except (BatchRefused, BundleMismatch) as error:
        raise CommandError(str(error), Exit.NO) from error
    except BatchStopped as error:
        say(f"stopped: {error}")
        say("finished parts are kept; run the same command again to continue")
        return Exit.NO
    except KeyboardInterrupt:
        say("interrupted; run the same command again to continue")
        return 130
    print(json.dumps(summary))
    return Exit.OK
