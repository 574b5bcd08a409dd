"""Convert your own text, a folder of UTF-8 ``.txt`` files, to documents.

A file is a document; blank lines separate its paragraphs, and the lines of a paragraph are joined. With ``--separator
blank-line``, blank lines separate documents and each line is a paragraph, as in the input of BERT's own scripts.

A SQuAD file can be converted too: each of its Wikipedia articles, without the questions, is a document.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bertqa.squad import MalformedSquad, read_squad
from training.data.documents import DataError, Document, open_output, write_documents

Separator = Literal["file", "blank-line"]

_BLANK_LINES = re.compile(r"\n\s*\n")


def convert_text(folder: Path, output: Path, separator: Separator) -> int:
    """Write the documents of a folder and its sub-folders.

    Returns:
        The number of documents.

    Raises:
        DataError: there is no text, a file is not UTF-8, or ``output`` holds documents of another origin.
    """
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise DataError(f"{folder}: holds no .txt file")
    open_output(output, {"origin": "text", "folder": str(folder), "separator": separator})
    documents = (document for file in files for document in _documents(file, file.relative_to(folder), separator))
    if not (written := write_documents(output / "text-00000.parquet", documents)):
        raise DataError(f"{folder}: its .txt files are empty")
    return written


def convert_articles(squad: Path, output: Path) -> int:
    """Write the articles of a SQuAD file as documents.

    Returns:
        The number of documents.

    Raises:
        DataError: the file is no SQuAD file, or ``output`` holds documents of another origin.
        OSError: the file cannot be read.
    """
    try:
        documents = articles_of(squad)
    except MalformedSquad as error:
        raise DataError(str(error)) from error
    open_output(output, {"origin": "articles", "file": str(squad)})
    return write_documents(output / "articles-00000.parquet", documents)


def articles_of(squad: Path) -> list[Document]:
    """Read the articles of a SQuAD file, with each paragraph that has questions once.

    Raises:
        MalformedSquad: see `read_squad`.
        OSError: the file cannot be read.
    """
    articles: dict[str, dict[str, None]] = {}
    for example in read_squad(squad):
        articles.setdefault(example.title, {})[" ".join(example.context.split())] = None
    return [Document(title, title.replace("_", " "), list(paragraphs)) for title, paragraphs in articles.items()]


def paragraphs_of(text: str) -> list[str]:
    """Split a text into paragraphs at blank lines, and join the lines of each paragraph."""
    return [joined for paragraph in _BLANK_LINES.split(text) if (joined := " ".join(paragraph.split()))]


def _documents(file: Path, name: Path, separator: Separator) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from error
    if separator == "file":
        yield Document(str(name), file.stem, paragraphs_of(text))
        return
    for number, block in enumerate(_BLANK_LINES.split(text)):
        lines = [joined for line in block.splitlines() if (joined := " ".join(line.split()))]
        yield Document(f"{name}#{number}", f"{file.stem} {number}", lines)
