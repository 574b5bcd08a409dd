"""Get the text, and make shard sets of it.

python -m training.data wikipedia     # a Wikipedia dump -> documents
python -m training.data books         # books of Project Gutenberg -> documents
python -m training.data text FOLDER   # your own .txt files -> documents
python -m training.data articles FILE # the articles of a SQuAD file, without its questions -> documents
python -m training.data tokenizer     # documents -> a WordPiece vocabulary, where none is at hand
python -m training.data shard         # documents -> a shard set for training.pretrain
python -m training.data squad         # the files of SQuAD, for training.finetune_squad
python -m training.data glue          # the files of GLUE, for training.finetune_glue

Documents are folders of Parquet files, and a shard set is made of any number of them: own text is one more folder.
Each step can be killed and goes on with what is missing when it is run again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bertqa.manifest import TOKENIZER_FILE
from training.data.benchmarks import GLUE_MIRROR, SQUAD_MIRROR, TASKS, download_glue, download_squad
from training.data.books import SOURCES, read_books
from training.data.documents import DataError, open_output, write_documents
from training.data.downloads import Checksum, DownloadError, download, http_client
from training.data.sharding import train_tokenizer, write_shard_set
from training.data.text import Separator, convert_articles, convert_text
from training.data.wikipedia import MIRROR, convert_dump, find_dump
from training.shards import ShardError, Storage

DATA = Path("data")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``run`` of the result does what it asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    wikipedia = commands.add_parser("wikipedia", help="a Wikipedia dump -> documents")
    wikipedia.add_argument(
        "--wiki", default="enwiki", help="as Wikimedia names it; simplewiki is a hundredth of enwiki"
    )
    wikipedia.add_argument("--date", default="latest", help="of the dump, YYYYMMDD; default: %(default)s")
    wikipedia.add_argument("--mirror", default=MIRROR, help="of Wikimedia's dumps; default: %(default)s")
    wikipedia.add_argument("--url", help="address of another dump, in place of --wiki, --date and --mirror")
    wikipedia.add_argument("--checksum", type=checksum, help="of the file at --url: sha1:… or sha256:…")
    wikipedia.add_argument("--dump", type=Path, help="a dump that is on this machine already")
    wikipedia.set_defaults(run=run_wikipedia)

    books = commands.add_parser("books", help="books -> documents")
    books.add_argument("--source", choices=sorted(SOURCES), default="gutenberg", help="default: %(default)s")
    books.add_argument("--count", type=at_least_one, default=1000, help="books, the first of the catalog")
    books.add_argument("--language", default="en", help="of those books; default: %(default)s")
    books.add_argument("--ids", nargs="+", metavar="ID", help="these books, in place of --count and --language")
    books.add_argument("--mirror", help="of the source")
    books.add_argument("--wait", type=float, default=2.0, help="seconds between two downloads; default: %(default)s")
    books.set_defaults(run=run_books)

    text = commands.add_parser("text", help="a folder of .txt files -> documents")
    text.add_argument("folder", type=Path, help="of .txt files in UTF-8, and sub-folders of them")
    text.add_argument(
        "--separator",
        choices=get_args(Separator),
        default="file",
        help="what separates documents: a file is one, with blank lines between its paragraphs; or blank lines do, "
        "with a paragraph on each line",
    )
    text.set_defaults(run=run_text)

    articles = commands.add_parser("articles", help="the articles of a SQuAD file -> documents")
    articles.add_argument("squad", type=Path, help="SQuAD file, v1.1 or v2.0, as python -m training.data squad has it")
    articles.set_defaults(run=run_articles)

    tokenizer = commands.add_parser("tokenizer", help="documents -> a WordPiece vocabulary")
    tokenizer.add_argument("--vocab-size", type=at_least_one, default=30522, help="default: %(default)s, as BERT's")
    tokenizer.add_argument("--cased", action="store_true", help="keep upper and lower case apart")
    tokenizer.set_defaults(run=run_tokenizer)

    shard = commands.add_parser("shard", help="documents -> a shard set")
    shard.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or a checkpoint that has one")
    shard.add_argument("--max-seq-len", type=at_least_one, default=128, help="tokens of a sequence; default: 128")
    shard.add_argument("--max-predictions-per-seq", type=at_least_one, default=20, help="masked at most; default: 20")
    shard.add_argument("--short-seq-prob", type=share, default=0.1, help="of shorter sequences; default: 0.1")
    shard.add_argument("--duplicates", type=at_least_one, default=1, help="times each document is cut into pairs")
    shard.add_argument("--language", default="en", help="whose sentences they are; default: %(default)s")
    shard.add_argument("--seed", type=int, default=1, help="of the order and the pairs; default: %(default)s")
    shard.add_argument("--storage", choices=get_args(Storage), default="parquet", help="default: %(default)s")
    shard.add_argument("--shard-mb", type=at_least_one, default=8, help="megabytes of text in a shard; default: 8")
    shard.set_defaults(run=run_shard)

    squad = commands.add_parser("squad", help="the official files of SQuAD v1.1 and v2.0")
    squad.add_argument("--mirror", default=SQUAD_MIRROR, help="folder of the files; default: %(default)s")
    squad.set_defaults(run=run_squad, output=DATA / "squad")

    glue = commands.add_parser("glue", help="the official files of GLUE")
    glue.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    glue.add_argument("--mirror", default=GLUE_MIRROR, help="default: %(default)s")
    glue.set_defaults(run=run_glue, output=DATA / "glue")

    for command in (tokenizer, shard):
        command.add_argument(
            "--documents", type=Path, nargs="+", required=True, metavar="DIR", help="folders of documents"
        )
    for command in (wikipedia, books):
        command.add_argument("--downloads", type=Path, default=DATA / "downloads", help="default: %(default)s")
    for command in (wikipedia, books, text, articles, tokenizer, shard):
        command.add_argument("--output", type=Path, required=True, help="what to write: a directory, or tokenizer.json")
    for command in (squad, glue):
        command.add_argument("--output", type=Path, help="default: %(default)s")
    for command in (wikipedia, shard):
        cores = len(os.sched_getaffinity(0))
        command.add_argument("--processes", type=at_least_one, default=cores, help="at once; default: all cores")
    args = parser.parse_args(argv)
    if args.command == "shard" and not 8 <= args.max_seq_len < 1 << 16:
        parser.error(f"--max-seq-len must be from 8 to 65535, not {args.max_seq_len}")
    if args.command == "shard" and args.max_predictions_per_seq >= args.max_seq_len:
        parser.error("--max-predictions-per-seq must be less than --max-seq-len")
    if args.command == "wikipedia" and args.checksum and not args.url:
        parser.error("--checksum belongs to --url")
    return args


def main(args: argparse.Namespace) -> None:
    """Run the command; exits with the reason where it cannot be done."""
    try:
        args.run(args)
    except (DataError, DownloadError, ShardError, OSError) as error:
        sys.exit(f"training.data: {error}")


def run_wikipedia(args: argparse.Namespace) -> None:
    """Download a dump unless it is there, and convert it."""
    dump = args.dump
    if dump is None:
        with http_client() as client:
            url, published = (
                (args.url, args.checksum) if args.url else find_dump(client, args.mirror, args.wiki, args.date)
            )
            dump = args.downloads / url.rpartition("/")[2]
            if published is None:
                print(
                    f"{url}: without --checksum its SHA-256 is recorded beside it, and checked from now on", flush=True
                )
            download(client, url, dump, published)
    documents = convert_dump(dump, args.output, processes=args.processes)
    print(f"{args.output}: {documents} documents", flush=True)


def run_books(args: argparse.Namespace) -> None:
    """Download the books that are not there, and convert them."""
    with http_client() as client:
        source = SOURCES[args.source](client, args.downloads / args.source, args.mirror, args.wait)
        books = args.ids or source.find(args.language, args.count)
        open_output(args.output, source.identity() | {"books": list(books)})
        found = read_books(source, books, leave_out=not args.ids)
        documents = write_documents(args.output / f"{args.source}-00000.parquet", found)
    print(f"{args.output}: {documents} documents", flush=True)


def run_text(args: argparse.Namespace) -> None:
    """Convert a folder."""
    print(f"{args.output}: {convert_text(args.folder, args.output, args.separator)} documents", flush=True)


def run_articles(args: argparse.Namespace) -> None:
    """Convert the articles of a SQuAD file."""
    print(f"{args.output}: {convert_articles(args.squad, args.output)} documents", flush=True)


def run_tokenizer(args: argparse.Namespace) -> None:
    """Learn a vocabulary."""
    size = train_tokenizer(args.documents, args.output, vocab_size=args.vocab_size, lowercase=not args.cased)
    print(f"{args.output}: {size} tokens", flush=True)


def run_shard(args: argparse.Namespace) -> None:
    """Write a shard set."""
    names = ("max_seq_len", "max_predictions_per_seq", "short_seq_prob", "duplicates", "language", "seed", "storage")
    made = write_shard_set(
        args.documents,
        args.tokenizer / TOKENIZER_FILE if args.tokenizer.is_dir() else args.tokenizer,
        args.output,
        shard_bytes=args.shard_mb << 20,
        processes=args.processes,
        **{name: getattr(args, name) for name in names},
    )
    tokens = sum(shard.tokens for shard in made.shards)
    print(f"{args.output}: {made.rows} sequences of {tokens} tokens in {len(made.shards)} shards", flush=True)


def run_squad(args: argparse.Namespace) -> None:
    """Download SQuAD."""
    with http_client() as client:
        download_squad(client, args.output, args.mirror)


def run_glue(args: argparse.Namespace) -> None:
    """Download GLUE."""
    with http_client() as client:
        download_glue(client, args.output, args.tasks, args.mirror)


def checksum(text: str) -> Checksum:
    """An argument that is a checksum."""
    try:
        return Checksum.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least_one(text: str) -> int:
    """An argument that is a count."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def share(text: str) -> float:
    """An argument that is a share of a whole."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {value}")
    return value


if __name__ == "__main__":
    main(parse_args())
