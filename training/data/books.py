"""Convert books to documents, from any source in the registry below.

BERT's second corpus, BookCorpus, is gone: its origin (smashwords.com, via the University of Toronto) was withdrawn, and
copies have an uncertain licence and cannot be verified. We use Project Gutenberg instead: books whose copyright has
expired in the United States. A book is a document; licence, producers' notes and everything that is not running text
are left out.

To add a source, add a class like `Gutenberg` and a line in `SOURCES`.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Protocol

import httpx
from tqdm import tqdm

from training.data.documents import DataError, Document
from training.data.downloads import NotOnServer, download
from training.data.text import paragraphs_of


class BookSource(Protocol):
    """A source of books; such a class is created with these arguments, from the flags of the same names."""

    def __init__(self, client: httpx.Client, folder: Path, mirror: str | None, wait: float) -> None:
        """Bind the downloads' client and folder, the address to use in place of the usual one, and a pause."""

    def identity(self) -> dict[str, object]:
        """Return what decides the text of a book, in addition to its id."""

    def find(self, language: str, count: int) -> list[str]:
        """Return the ids of the first ``count`` books in a language."""

    def read(self, book: str) -> Document:
        """Download a book unless it exists, and read it."""


@dataclass(frozen=True)
class Gutenberg:
    """Project Gutenberg, by its catalog and one of its mirrors, which are there for bulk downloads.

    Its own server is for readers, and blocks programs (https://www.gutenberg.org/policy/robot_access.html).
    """

    client: httpx.Client
    folder: Path
    mirror: str | None = None
    wait: float = 2.0  # seconds between two books, as its policy requires of programs

    def identity(self) -> dict[str, object]:
        """The mirror does not matter."""
        return {"origin": "gutenberg"}

    def find(self, language: str, count: int) -> list[str]:
        """Return the numbers of books with plain text, from the catalog, in ascending order."""
        catalog = self.folder / "pg_catalog.csv"
        download(self.client, f"{self._mirror}/cache/epub/feeds/pg_catalog.csv", catalog, None)
        rows = csv.DictReader(io.StringIO(catalog.read_text(encoding="utf-8")))
        try:
            texts = [row for row in rows if row["Type"] == "Text" and row["Language"] == language]
            return [str(number) for number in sorted(int(row["Text#"]) for row in texts)[:count]]
        except (KeyError, ValueError) as error:
            raise DataError(f"{catalog}: not a catalog of Project Gutenberg ({error!r})") from error

    def read(self, book: str) -> Document:
        """Download and read a book by its number."""
        path = self.folder / f"pg{book}.txt"
        if not path.exists():
            # Project Gutenberg regenerates these files now and then and publishes no checksums for them.
            download(self.client, f"{self._mirror}/cache/epub/{book}/pg{book}.txt", path, None)
            sleep(self.wait)
        return gutenberg_document(book, path)

    @property
    def _mirror(self) -> str:
        return (self.mirror or "https://gutenberg.pglaf.org").rstrip("/")


SOURCES: dict[str, Callable[[httpx.Client, Path, str | None, float], BookSource]] = {"gutenberg": Gutenberg}
"""The sources that ``--source`` knows."""


_START = re.compile(
    r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*", re.MULTILINE | re.DOTALL | re.IGNORECASE
)
_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)",
    re.MULTILINE | re.IGNORECASE,
)
_TITLE = re.compile(r"^Title:\s*(.+)$", re.MULTILINE)
_CREDITS = re.compile(
    r"produced by|transcriber|distributed proofread|pgdp\.net|project gutenberg|\[illustration", re.IGNORECASE
)
_MARKUP = re.compile(r"\[(?:footnote|illustration|sidenote)[^\]]*\]|\[\d+\]|(?<!\w)_|_(?!\w)", re.IGNORECASE)
MIN_WORDS = 5
"""Shorter paragraphs are headings, dates and page numbers."""


def gutenberg_document(book: str, path: Path) -> Document:
    """Read a plain text of Project Gutenberg, without its licence, credits, headings and footnote marks.

    Raises:
        DataError: the marks around the book's text are missing.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # the encoding of older files
    text = text.replace("\r\n", "\n")
    start, end = _START.search(text), _END.search(text)
    if not start or not end or end.start() < start.end():
        raise DataError(f"{path}: has no '*** START OF' and '*** END OF' lines of Project Gutenberg")
    title = _TITLE.search(text, 0, start.start())
    paragraphs = (
        _MARKUP.sub("", paragraph)
        for paragraph in paragraphs_of(text[start.end() : end.start()])
        if not _CREDITS.search(paragraph) and not paragraph.isupper()
    )
    kept = [paragraph.strip() for paragraph in paragraphs if len(paragraph.split()) >= MIN_WORDS]
    return Document(f"gutenberg/{book}", title[1].strip() if title else book, kept)


def read_books(source: BookSource, books: Sequence[str], *, leave_out: bool) -> Iterator[Document]:
    """Download and read books, one after another.

    Args:
        source: source of the books.
        books: their ids.
        leave_out: skip books that the server does not have or that are malformed, with a warning.

    Raises:
        DataError: a book is malformed.
        DownloadError: a book cannot be downloaded.
    """
    for book in tqdm(books, unit="book", disable=None):
        try:
            yield source.read(book)
        except (NotOnServer, DataError) as error:
            if not leave_out:
                raise
            tqdm.write(f"left out: {error}")
