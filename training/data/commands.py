"""``bertqa train data`` and ``python -m training.data``: get text, make shard sets of it, and get the benchmarks.

Documents are folders of Parquet files, and a shard set is made of any number of them: your own text is one more folder.
Each step may be killed; run again, it does what is missing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bertqa.cli.command import CommandError, Exit, at_least_one, command, group, not_negative
from training.glue import TASKS

DATA = Path("data")

app = group("Get text, make shard sets of it, and get SQuAD and GLUE.")

Processes = Annotated[
    int, typer.Option(callback=at_least_one, metavar="N", show_default="all cores", help="Processes at once.")
]
Downloads = Annotated[Path, typer.Option(metavar="DIR", help="Directory that keeps what is downloaded.")]
_CORES = len(os.sched_getaffinity(0))


def _checksum(text: str | None) -> str | None:
    from training.data.downloads import Checksum  # noqa: PLC0415 - needs httpx, which --help does without

    if text is not None:
        try:
            Checksum.parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


def _source(name: str) -> str:
    from training.data.books import SOURCES  # noqa: PLC0415

    if name not in SOURCES:
        raise typer.BadParameter(f"must be one of {', '.join(sorted(SOURCES))}, not {name!r}")
    return name


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"must be from 0 to 1, not {value}")
    return value


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, (text or "").split(","))))


@contextmanager
def _data_errors() -> Iterator[None]:
    from training.data.documents import DataError  # noqa: PLC0415
    from training.data.downloads import DownloadError  # noqa: PLC0415
    from training.shards import ShardError  # noqa: PLC0415

    try:
        yield
    except (DataError, DownloadError, ShardError, OSError) as error:
        raise CommandError(str(error), Exit.NO) from error


@dataclass(frozen=True, kw_only=True)
class DocumentsOutput:
    """The option of the steps that write documents."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write documents to.")]


@dataclass(frozen=True, kw_only=True)
class WikipediaOptions(DocumentsOutput):
    """Options of ``bertqa train data wikipedia``."""

    wiki: Annotated[
        str, typer.Option(help="Name that Wikimedia gives the wiki; simplewiki is a hundredth of enwiki.")
    ] = "enwiki"
    date: Annotated[str, typer.Option(metavar="YYYYMMDD", help="Date of the dump.")] = "latest"
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", show_default="Wikimedia's own", help="Mirror of Wikimedia's dumps.")
    ] = None
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Another dump, instead of --wiki, --date and --mirror.")
    ] = None
    checksum: Annotated[
        str | None,
        typer.Option(callback=_checksum, metavar="KIND:HEX", help="Checksum of the file at --url: sha1:… or sha256:…"),
    ] = None
    dump: Annotated[Path | None, typer.Option(metavar="FILE", help="Dump that is on this machine already.")] = None
    downloads: Downloads = DATA / "downloads"
    processes: Processes = _CORES

    def __post_init__(self) -> None:
        if self.checksum and not self.url:
            raise ValueError("--checksum belongs to --url")


@command(app, WikipediaOptions, extra="training")
def wikipedia(options: WikipediaOptions) -> None:
    """Convert a Wikipedia dump to documents."""
    from training.data.downloads import Checksum, download, http_client  # noqa: PLC0415
    from training.data.wikipedia import MIRROR, convert_dump, find_dump  # noqa: PLC0415

    dump = options.dump
    with _data_errors():
        if dump is None:
            with http_client() as client:
                given = Checksum.parse(options.checksum) if options.checksum else None
                url, published = (
                    (options.url, given)
                    if options.url
                    else find_dump(client, options.mirror or MIRROR, options.wiki, options.date)
                )
                dump = options.downloads / url.rpartition("/")[2]
                if published is None:
                    print(
                        f"{url}: without --checksum its SHA-256 is stored next to it and checked from now on",
                        flush=True,
                    )
                download(client, url, dump, published)
        documents = convert_dump(dump, options.output, processes=options.processes)
    print(f"{options.output}: {documents} documents", flush=True)


@dataclass(frozen=True, kw_only=True)
class BooksOptions(DocumentsOutput):
    """Options of ``bertqa train data books``."""

    source: Annotated[str, typer.Option(callback=_source, help="Where the books come from.")] = "gutenberg"
    count: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Number of books, the first of the catalog.")
    ] = 1000
    language: Annotated[str, typer.Option(help="Language of those books.")] = "en"
    ids: Annotated[
        str | None, typer.Option(metavar="ID,ID", help="These books, instead of --count and --language.")
    ] = None
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", show_default="the source's own", help="Mirror of the source.")
    ] = None
    wait: Annotated[
        float, typer.Option(callback=not_negative, metavar="SECONDS", help="Pause between two downloads.")
    ] = 2.0
    downloads: Downloads = DATA / "downloads"


@command(app, BooksOptions, extra="training")
def books(options: BooksOptions) -> None:
    """Convert books of Project Gutenberg to documents."""
    from training.data.books import SOURCES, read_books  # noqa: PLC0415
    from training.data.documents import open_output, write_documents  # noqa: PLC0415
    from training.data.downloads import http_client  # noqa: PLC0415

    with _data_errors(), http_client() as client:
        folder = options.downloads / options.source
        source = SOURCES[options.source](client, folder, options.mirror, options.wait)
        wanted = _names(options.ids)
        found = wanted or source.find(options.language, options.count)
        open_output(options.output, source.identity() | {"books": list(found)})
        written = read_books(source, found, leave_out=not wanted)
        documents = write_documents(options.output / f"{options.source}-00000.parquet", written)
    print(f"{options.output}: {documents} documents", flush=True)


@dataclass(frozen=True, kw_only=True)
class TextOptions(DocumentsOutput):
    """Options of ``bertqa train data text``."""

    folder: Annotated[Path, typer.Argument(help="Folder of .txt files in UTF-8, with its sub-folders.")]
    separator: Annotated[
        Literal["file", "blank-line"],
        typer.Option(
            help="file: a file is a document, with blank lines between paragraphs; blank-line: blank lines separate "
            "documents, and each line is a paragraph."
        ),
    ] = "file"


@command(app, TextOptions, extra="training")
def text(options: TextOptions) -> None:
    """Convert your own .txt files to documents."""
    from training.data.text import convert_text  # noqa: PLC0415

    with _data_errors():
        documents = convert_text(options.folder, options.output, options.separator)
    print(f"{options.output}: {documents} documents", flush=True)


@dataclass(frozen=True, kw_only=True)
class ArticlesOptions(DocumentsOutput):
    """Options of ``bertqa train data articles``."""

    squad: Annotated[Path, typer.Argument(help="SQuAD file, v1.1 or v2.0.")]


@command(app, ArticlesOptions, extra="training")
def articles(options: ArticlesOptions) -> None:
    """Convert the articles of a SQuAD file to documents."""
    from training.data.text import convert_articles  # noqa: PLC0415

    with _data_errors():
        documents = convert_articles(options.squad, options.output)
    print(f"{options.output}: {documents} documents", flush=True)


@dataclass(frozen=True, kw_only=True)
class DocumentsInput:
    """The option of the steps that read documents."""

    documents: Annotated[
        list[Path], typer.Option(metavar="DIR", help="Folder of documents; give it again for each other folder.")
    ]


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(DocumentsInput):
    """Options of ``bertqa train data tokenizer``."""

    output: Annotated[Path, typer.Option(metavar="FILE", help="tokenizer.json to write.")]
    vocab_size: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Tokens of the vocabulary; the default is BERT's.")
    ] = 30522
    cased: Annotated[bool, typer.Option("--cased", help="Keep upper and lower case apart.")] = False


@command(app, TokenizerOptions, extra="training")
def tokenizer(options: TokenizerOptions) -> None:
    """Learn a WordPiece vocabulary from documents."""
    from training.data.sharding import train_tokenizer  # noqa: PLC0415

    with _data_errors():
        size = train_tokenizer(
            options.documents, options.output, vocab_size=options.vocab_size, lowercase=not options.cased
        )
    print(f"{options.output}: {size} tokens", flush=True)


@dataclass(frozen=True, kw_only=True)
class ShardOptions(DocumentsInput):
    """Options of ``bertqa train data shard``."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write the shard set to.")]
    tokenizer: Annotated[Path, typer.Option(metavar="PATH", help="tokenizer.json, or a checkpoint that has one.")]
    max_seq_len: Annotated[int, typer.Option(min=8, max=65535, metavar="N", help="Tokens of a sequence.")] = 128
    max_predictions_per_seq: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Most masked tokens of a sequence.")
    ] = 20
    short_seq_prob: Annotated[float, typer.Option(callback=_share, help="Share of shorter sequences.")] = 0.1
    duplicates: Annotated[
        int, typer.Option(callback=at_least_one, metavar="N", help="Times that each document is cut into pairs.")
    ] = 1
    language: Annotated[str, typer.Option(help="Language of the sentences.")] = "en"
    seed: Annotated[int, typer.Option(help="Seed of the order and the pairs.")] = 1
    storage: Annotated[Literal["parquet", "tfrecord"], typer.Option(help="Format of the shards.")] = "parquet"
    shard_mb: Annotated[int, typer.Option(callback=at_least_one, metavar="N", help="Megabytes of text in a shard.")] = 8
    processes: Processes = _CORES

    def __post_init__(self) -> None:
        if self.max_predictions_per_seq >= self.max_seq_len:
            raise ValueError("--max-predictions-per-seq must be less than --max-seq-len")


@command(app, ShardOptions, extra="training")
def shard(options: ShardOptions) -> None:
    """Make a shard set from documents, for pre-training."""
    from bertqa.manifest import TOKENIZER_FILE  # noqa: PLC0415
    from training.data.sharding import write_shard_set  # noqa: PLC0415

    with _data_errors():
        made = write_shard_set(
            options.documents,
            options.tokenizer / TOKENIZER_FILE if options.tokenizer.is_dir() else options.tokenizer,
            options.output,
            max_seq_len=options.max_seq_len,
            max_predictions_per_seq=options.max_predictions_per_seq,
            short_seq_prob=options.short_seq_prob,
            duplicates=options.duplicates,
            language=options.language,
            seed=options.seed,
            storage=options.storage,
            shard_bytes=options.shard_mb << 20,
            processes=options.processes,
        )
    tokens = sum(each.tokens for each in made.shards)
    print(f"{options.output}: {made.rows} sequences of {tokens} tokens in {len(made.shards)} shards", flush=True)


@dataclass(frozen=True, kw_only=True)
class SquadOptions:
    """Options of ``bertqa train data squad``."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write the files to.")] = DATA / "squad"
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", show_default="the official one", help="Folder of the files.")
    ] = None


@command(app, SquadOptions, extra="training")
def squad(options: SquadOptions) -> None:
    """Download the official files of SQuAD v1.1 and v2.0."""
    from training.data.benchmarks import SQUAD_MIRROR, download_squad  # noqa: PLC0415
    from training.data.downloads import http_client  # noqa: PLC0415

    with _data_errors(), http_client() as client:
        download_squad(client, options.output, options.mirror or SQUAD_MIRROR)


@dataclass(frozen=True, kw_only=True)
class GlueOptions:
    """Options of ``bertqa train data glue``."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write the folders to.")] = DATA / "glue"
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,TASK", show_default="all", help=f"Some of {', '.join(TASKS)}."),
    ] = None
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", show_default="the official one", help="Server of the archives.")
    ] = None

    def __post_init__(self) -> None:
        if unknown := [name for name in _names(self.tasks) if name not in TASKS]:
            raise ValueError(f"--tasks: must be some of {', '.join(TASKS)}, not {unknown[0]!r}")


@command(app, GlueOptions, extra="training")
def glue(options: GlueOptions) -> None:
    """Download the official files of GLUE."""
    from training.data.benchmarks import GLUE_MIRROR, download_glue  # noqa: PLC0415
    from training.data.downloads import http_client  # noqa: PLC0415

    with _data_errors(), http_client() as client:
        download_glue(client, options.output, _names(options.tasks) or tuple(TASKS), options.mirror or GLUE_MIRROR)
