"""Convert a Wikipedia dump to plain-text documents.

Wikimedia publishes each wiki as bzip2-compressed XML in many streams of 100 pages, with SHA-1 sums. The file is split
between streams into parts, and each part becomes one file of documents, in one process. The standard library reads the
XML while it is decompressed; mwparserfromhell parses the wikitext. Only running text is kept: no redirects or
disambiguation pages, and no headings, lists, tables, templates, references, galleries, files or categories.
"""

import bz2
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import httpx
import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode
from tqdm import tqdm

from training.data.documents import DataError, Document, document_groups, open_output, write_documents
from training.data.downloads import Checksum, DownloadError, fetch_text
from training.data.parallel import each

MIRROR = "https://dumps.wikimedia.org"
PART_BYTES = 32 << 20
"""Compressed bytes of a part, about 100 MB of XML."""
MIN_WORDS = 5
"""Shorter paragraphs are captions and leftover markup."""


class Dump(NamedTuple):
    """A dump's file on the server."""

    url: str
    checksum: Checksum


class Part(NamedTuple):
    """Some streams of a dump, and their output file of documents."""

    dump: Path
    begin: int  # bytes
    end: int
    output: Path


def find_dump(client: httpx.Client, mirror: str, wiki: str, date: str) -> Dump:
    """Find the address and the published SHA-1 of a wiki's articles.

    Args:
        client: see `training.data.downloads.http_client`.
        mirror: of dumps.wikimedia.org.
        wiki: "enwiki", "simplewiki".
        date: "20260901", or "latest" for the last complete one.

    Raises:
        DownloadError: there is no such dump, or its list of checksums does not have it.
    """
    sums = f"{mirror.rstrip('/')}/{wiki}/{date}/{wiki}-{date}-sha1sums.txt"
    # The list of "latest" has dated names, so that a dump published meanwhile is not mixed in.
    dated = r"\d{8}" if date == "latest" else re.escape(date)
    name = rf"{re.escape(wiki)}-({dated})-pages-articles-multistream\.xml\.bz2"
    line = re.search(rf"^([0-9a-f]{{40}})\s+({name})$", fetch_text(client, sums), re.MULTILINE)
    if not line:
        raise DownloadError(f"{sums}: has no sum of pages-articles-multistream.xml.bz2; is --date {date} complete?")
    digest, file, found = line.groups()
    return Dump(f"{mirror.rstrip('/')}/{wiki}/{found}/{file}", Checksum("sha1", digest))


def convert_dump(dump: Path, output: Path, *, processes: int = 1, part_bytes: int = PART_BYTES) -> int:
    """Write the documents of a dump; files finished by an earlier run are kept.

    Args:
        dump: ``…-pages-articles-multistream.xml.bz2``. A file that is not multistream is read by a single process.
        output: folder of the documents.
        processes: at once.
        part_bytes: of the dump that become one file.

    Returns:
        The number of documents.

    Raises:
        DataError: the dump is not bzip2, not XML or has no article, or ``output`` holds documents of another origin.
    """
    open_output(output, {"origin": "wikipedia", "dump": dump.name, "bytes": dump.stat().st_size, "part": part_bytes})
    wiki = dump.name.split("-")[0]
    try:
        bounds = _bounds(dump, part_bytes)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{dump}: corrupt ({error})") from error
    parts = [Part(dump, *bound, output / f"{wiki}-{number:05}.parquet") for number, bound in enumerate(bounds)]
    left = [part for part in parts if not part.output.exists()]
    with tqdm(total=bounds[-1][1], unit="B", unit_scale=True, desc=dump.name, disable=None) as progress:
        progress.update(bounds[-1][1] - sum(part.end - part.begin for part in left))
        for part, _ in each(convert_part, left, processes):
            progress.update(part.end - part.begin)
    documents = sum(group.documents for part in parts for group in document_groups(part.output))
    if not documents:
        raise DataError(f"{dump}: holds no article")
    return documents


def convert_part(part: Part) -> int:
    """Write the documents of some streams, and return their number.

    Raises:
        DataError: the streams are not bzip2 or do not have whole pages.
    """
    try:
        return write_documents(part.output, _documents(part))
    except (OSError, EOFError, KeyError, ElementTree.ParseError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the file system; bz2 has no number for its own
        raise DataError(f"{part.dump}, bytes {part.begin} to {part.end}: corrupt or no wiki dump ({error})") from error


def _documents(part: Part) -> Iterator[Document]:
    origin = part.dump.name.split("-pages-")[0]
    for page in _pages(_decompressed(part)):
        if page.redirect or page.namespace != "0" or _is_disambiguation(page):
            continue
        yield Document(f"{origin}/{page.id}", page.title, paragraphs_of(page.text))


class _Page(NamedTuple):
    id: str
    title: str
    namespace: str
    redirect: bool
    text: str  # wikitext


def _pages(blocks: Iterable[bytes]) -> Iterator[_Page]:
    """Parse the pages of a part's XML; only a dump's first part opens the root element, and only the last closes it."""
    parser: Any = ElementTree.XMLPullParser(["start", "end"])  # the events of these two kinds are pairs with an element
    root: ElementTree.Element | None = None
    for number, block in enumerate(blocks):
        if number == 0 and not block.lstrip().startswith(b"<mediawiki"):
            parser.feed("<mediawiki>")
        parser.feed(block)
        for event, element in parser.read_events():
            root = element if root is None else root
            if event == "end" and _local(element) == "page":
                yield _page(element)
                root.clear()  # otherwise the tree would keep the whole dump


def _page(element: ElementTree.Element) -> _Page:
    fields = {_local(child): child for child in element}
    revision = {_local(child): child.text or "" for child in fields["revision"]} if "revision" in fields else {}
    return _Page(
        id=fields["id"].text or "",
        title=fields["title"].text or "",
        namespace=fields["ns"].text or "",
        redirect="redirect" in fields,
        text=revision.get("text", ""),
    )


def _local(element: ElementTree.Element) -> str:
    """Return an element's name without its namespace, which changes with the version of the export format."""
    return element.tag.rpartition("}")[2]


_DISAMBIGUATION = re.compile(
    r"\{\{\s*(disambig(uation)?|dab|disamb|hndis|geodis|mil-?unit[- ]?dis|numberdis|school[- ]?dis|surname|given name)"
    r"\s*[|}]|__DISAMBIG__",
    re.IGNORECASE,
)


def _is_disambiguation(page: _Page) -> bool:
    return page.title.endswith("(disambiguation)") or bool(_DISAMBIGUATION.search(page.text))


_NO_TEXT = frozenset(
    (
        *("ref", "references", "table", "gallery", "imagemap", "graph", "mapframe", "maplink", "timeline", "score"),
        *("math", "chem", "ce", "hiero", "syntaxhighlight", "source", "code", "pre", "poem"),
        *("noinclude", "includeonly", "templatestyles", "inputbox", "indicator", "del", "s"),
    )
)
"""Tags that are removed with their content."""
_FILE_OR_CATEGORY = re.compile(
    r"\s*:?\s*(file|image|category|media|wikt|wiktionary|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE
)
_DROPPED = "\0"  # marks a line that is not running text: a heading or a list item


def paragraphs_of(wikitext: str) -> list[str]:
    """Return the running text of a page, by paragraph."""
    text = _text_of(mwparserfromhell.parse(_without_hidden(wikitext), skip_style_tags=True))
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if not line.strip() or _DROPPED in line:
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    tidied = (_tidy(" ".join(lines)) for lines in paragraphs)
    return [paragraph for paragraph in tidied if len(paragraph.split()) >= MIN_WORDS]


def _text_of(code: Wikicode | None) -> str:
    return "".join(map(_node_text, code.nodes)) if code else ""


def _node_text(node: Any) -> str:
    match node:
        case Text():
            return str(node.value)
        case Wikilink():
            if _FILE_OR_CATEGORY.match(str(node.title)):
                return ""
            return _text_of(node.text) if node.text is not None else _text_of(node.title)
        case ExternalLink():
            return _text_of(node.title)
        case HTMLEntity():
            return str(node.normalize())
        case Heading():
            return f"\n{_DROPPED}\n"
        case Template():
            return _template_text(node)
        case Tag():
            name = str(node.tag).strip().lower()
            if node.wiki_markup and name in ("li", "dd", "dt", "hr"):
                return _DROPPED
            if name == "br":
                return " "
            return "" if name in _NO_TEXT else _text_of(node.contents)
    return ""  # comments, arguments of templates


def _positional(number: int) -> Callable[[Template], str]:
    """Return the text of a template's positional argument, counted from 1; -1 is the last one."""

    def text(template: Template) -> str:
        values = [parameter.value for parameter in template.params if not parameter.showkey]
        return _text_of(values[number - 1 if number > 0 else number]) if len(values) >= abs(number) else ""

    return text


def _quantity(template: Template) -> str:
    return f"{_positional(1)(template)} {_positional(2)(template)}".strip()


_TEMPLATES: dict[str, Callable[[Template], str]] = {
    **dict.fromkeys(("convert", "cvt"), _quantity),
    **dict.fromkeys(("lang", "langx", "transliteration", "transl"), _positional(-1)),
    **dict.fromkeys(
        ("nowrap", "nobr", "nobold", "small", "abbr", "ill", "interlanguage link", "sic", "math", "mvar"),
        _positional(1),
    ),
    **dict.fromkeys(("circa", "c."), lambda template: f"c. {_positional(1)(template)}".strip()),
    "as of": lambda template: f"As of {_positional(1)(template)}",
    **dict.fromkeys(("snd", "spnd", "spaced ndash", "ndash", "endash", "en dash"), lambda template: " – "),
    **dict.fromkeys(("mdash", "emdash", "em dash"), lambda template: "—"),
    **dict.fromkeys(("'", "'s"), lambda template: str(template.name).strip().replace("'", "’")),
}
"""Templates that occur within sentences, and the text that they show; all others are removed."""


def _template_text(template: Template) -> str:
    show = _TEMPLATES.get(str(template.name).strip().lower())
    return show(template) if show else ""


_HIDDEN = re.compile(r"<!--.*?-->|<ref\b[^>]*?/\s*>|<ref\b[^>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_INNERMOST_TEMPLATE = re.compile(r"\{\{\s*([^{}|]*?)\s*(?:\|[^{}]*)?\}\}")
_INNERMOST_TABLE = re.compile(r"^[\s:]*\{\|(?:(?!\{\||\|\}(?!\})).)*\|\}(?!\})", re.DOTALL | re.MULTILINE)


def _without_hidden(wikitext: str) -> str:
    """Remove comments, references, tables and invisible templates, because parsing them takes most of the time."""
    before, text = "", _HIDDEN.sub("", wikitext)
    while text != before:
        before, text = text, _INNERMOST_TABLE.sub("", _INNERMOST_TEMPLATE.sub(_shown, text))
    return text


def _shown(template: re.Match[str]) -> str:
    return template[0] if template[1].lower() in _TEMPLATES else ""


_TIDY = [
    (re.compile(r"'{2,}"), ""),  # bold and italics
    (re.compile(r"\s+"), " "),
    (re.compile(r"\(\s*(?:[,;:]\s*)+"), "("),  # "(; born 1815)", where a template of the pronunciation was
    (re.compile(r"(?:\s*[,;:])+\s*\)"), ")"),
    (re.compile(r"\s*\(\s*\)"), ""),
    (re.compile(r"\s+([,.;:)])"), r"\1"),
]


def _tidy(text: str) -> str:
    """Close the gaps left by removed markup."""
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # headers of a bzip2 stream and of its first block, which begin at a byte


def _bounds(dump: Path, part_bytes: int) -> list[tuple[int, int]]:
    """Compute the bounds of a dump's parts: between streams, if the streams have whole pages."""
    if not (size := dump.stat().st_size):
        raise DataError(f"{dump}: is empty")
    with dump.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts = [match.start() for match in _STREAM.finditer(data)]
        if not starts or starts[0] != 0:
            raise DataError(f"{dump}: is no bzip2 file")
        if len(starts) == 1:
            return [(0, size)]
        head = bz2.BZ2Decompressor().decompress(data[starts[1] : starts[1] + (1 << 20)], 64)
        tail = b""
        for block in _decompressed(Part(dump, starts[-1], size, dump)):
            tail = (tail + block)[-100:]
        if not tail.rstrip().endswith(b"</mediawiki>"):
            raise DataError(f"{dump}: is cut off, its last stream does not end with </mediawiki>")
        if not head.lstrip().startswith((b"<page>", b"</mediawiki>")):
            return [(0, size)]  # its streams do not have whole pages
    bounds, begin = [], 0
    for start in [*starts[1:], size]:
        if start - begin >= part_bytes or start == size:
            bounds.append((begin, start))
            begin = start
    return bounds


def _decompressed(part: Part) -> Iterator[bytes]:
    """Read the XML of a part's streams, in blocks.

    This does not use bz2.open, which ignores a damaged stream after a complete one.

    Raises:
        OSError: a stream is corrupt.
        EOFError: the last stream is truncated.
    """
    stream, left = None, part.end - part.begin
    with part.dump.open("rb") as file:
        file.seek(part.begin)
        while data := file.read(min(1 << 20, left)):
            left -= len(data)
            while data:
                stream = stream or bz2.BZ2Decompressor()
                if block := stream.decompress(data):
                    yield block
                data = stream.unused_data
                if stream.eof:
                    stream = None
    if stream or left:
        raise EOFError("the last stream is cut off")
