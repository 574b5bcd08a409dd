"""Test the sources of documents: interrupted downloads, a dump, books, own text, SQuAD and GLUE."""

import bz2
import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertqa.cli.command import parse, status
from tests.support.paths import ROOT
from training.data import benchmarks, books
from training.data.commands import WikipediaOptions, app
from training.data.documents import DataError, Document, document_groups, open_output, read_group, write_documents
from training.data.downloads import Checksum, DownloadError, NotOnServer, download, http_client
from training.data.text import convert_articles, convert_text
from training.data.wikipedia import convert_dump, find_dump, paragraphs_of


class FileServer:
    """Serves files with ranges and ETags, as the origins do; can break a transfer off after so many bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: list[int] = []  # bytes of the next transfers, before each is broken off
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        data = self.files.get(request.path)
        if data is None:
            request.send_error(404)
            return
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        begin = 0
        if wanted and request.headers.get("If-Range") == etag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(data):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(data)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(data) - begin))
        request.end_headers()
        body = data[begin:]
        if self.break_after:
            body = body[: self.break_after.pop(0)]
        request.wfile.write(body)
        request.close_connection = True

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with http_client() as client:
        yield client


def sha256(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).hexdigest())


BYTES = bytes(range(256)) * 4000


def test_a_transfer_that_breaks_goes_on_where_it_broke(
    server: FileServer, client: httpx.Client, tmp_path: Path
) -> None:
    server.files["/data.bin"] = BYTES
    server.break_after = [300_000, 200_000]
    waited: list[float] = []
    path = tmp_path / "folder" / "data.bin"
    download(client, f"{server.url}/data.bin", path, sha256(BYTES), wait=waited.append)
    assert path.read_bytes() == BYTES
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert waited == [1.0, 1.0]
    assert list(path.parent.iterdir()) == [path]
    download(client, f"{server.url}/data.bin", path, sha256(BYTES), wait=waited.append)
    assert len(server.requests) == 3  # the file was there, and right


def test_a_download_goes_on_in_a_later_process(server: FileServer, client: httpx.Client, tmp_path: Path) -> None:
    server.files["/data.bin"] = BYTES

    def give_up(seconds: float) -> None:
        raise KeyboardInterrupt

    server.break_after = [400_000]
    path = tmp_path / "data.bin"
    with pytest.raises(KeyboardInterrupt):
        download(client, f"{server.url}/data.bin", path, sha256(BYTES), wait=give_up)
    assert not path.exists()
    download(client, f"{server.url}/data.bin", path, sha256(BYTES), wait=give_up)
    assert path.read_bytes() == BYTES
    assert server.requests[-1] == ("/data.bin", "bytes=400000-")


def test_a_file_that_changed_meanwhile_is_downloaded_from_its_beginning(
    server: FileServer, client: httpx.Client, tmp_path: Path
) -> None:
    server.files["/data.bin"] = BYTES
    server.break_after = [400_000]
    newer = BYTES[::-1]
    path = tmp_path / "data.bin"
    download(
        client,
        f"{server.url}/data.bin",
        path,
        sha256(newer),
        wait=lambda _: server.files.update({"/data.bin": newer}),
    )
    assert path.read_bytes() == newer


@pytest.mark.parametrize("more", [b"", b"more than the file has"])
def test_a_process_that_ended_between_the_last_byte_and_the_check_is_no_problem(
    server: FileServer, client: httpx.Client, tmp_path: Path, more: bytes
) -> None:
    server.files["/data.bin"] = BYTES
    server.break_after = [1000]

    def complete(seconds: float) -> None:
        if len(server.requests) == 1:
            (tmp_path / "data.bin.partial").write_bytes(BYTES + more)

    download(client, f"{server.url}/data.bin", tmp_path / "data.bin", sha256(BYTES), wait=complete)
    assert (tmp_path / "data.bin").read_bytes() == BYTES


def test_a_wrong_checksum_is_told_and_the_file_does_not_appear(
    server: FileServer, client: httpx.Client, tmp_path: Path
) -> None:
    server.files["/data.bin"] = BYTES
    path = tmp_path / "data.bin"
    wrong = sha256(b"something else")
    found = hashlib.sha256(BYTES).hexdigest()
    with pytest.raises(DownloadError, match=rf"data\.bin.*is sha256:{found}, should be {wrong}; it was deleted"):
        download(client, f"{server.url}/data.bin", path, wrong)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"damaged on disk")
    with pytest.raises(DownloadError, match=r"data\.bin.*delete it to download it again"):
        download(client, f"{server.url}/data.bin", path, sha256(BYTES))
    assert path.read_bytes() == b"damaged on disk"


def test_without_a_published_checksum_the_first_one_found_is_kept(
    server: FileServer, client: httpx.Client, tmp_path: Path
) -> None:
    server.files["/data.bin"] = BYTES
    path = tmp_path / "data.bin"
    download(client, f"{server.url}/data.bin", path, None)
    assert (tmp_path / "data.bin.sha256").read_text() == f"{hashlib.sha256(BYTES).hexdigest()}  data.bin\n"
    path.write_bytes(BYTES[:-1])
    with pytest.raises(DownloadError, match="should be sha256"):
        download(client, f"{server.url}/data.bin", path, None)


def test_what_the_server_does_not_give_is_told(server: FileServer, client: httpx.Client, tmp_path: Path) -> None:
    with pytest.raises(NotOnServer, match=r"/missing: 404"):
        download(client, f"{server.url}/missing", tmp_path / "missing", None)
    server.files["/data.bin"] = BYTES
    server.break_after = [0] * 99
    waited: list[float] = []
    with pytest.raises(DownloadError, match=r"8 times; the same command goes on from .*data\.bin\.partial"):
        download(client, f"{server.url}/data.bin", tmp_path / "data.bin", None, wait=waited.append)
    assert waited == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


@settings(max_examples=25)
@given(data=st.binary(max_size=5000), breaks=st.lists(st.integers(1, 2000), max_size=5))
def test_whatever_breaks_the_file_is_whole(data: bytes, breaks: list[int]) -> None:
    server = FileServer()
    server.files["/x"], server.break_after = data, list(breaks)
    try:
        with http_client() as client, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            download(client, f"{server.url}/x", path, sha256(data), wait=lambda _: None)
            assert path.read_bytes() == data
    finally:
        server.close()


@pytest.mark.parametrize("text", ["md5:" + "0" * 32, "sha1:" + "0" * 39, "sha256:" + "g" * 64, "0" * 64])
def test_a_malformed_checksum_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(WikipediaOptions, ["--output", "o", "--url", "http://x/y", "--checksum", text])
    assert "--checksum" in capsys.readouterr().err


# Wikipedia


def page(number: int, title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    moved = f'<redirect title="{redirect}" />' if redirect else ""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f"  <page>\n    <title>{title}</title>\n    <ns>{namespace}</ns>\n    <id>{number}</id>\n    {moved}\n"
        f"    <revision>\n      <id>{number + 1000}</id>\n      <model>wikitext</model>\n"
        f'      <text bytes="{len(text)}" xml:space="preserve">{escaped}</text>\n    </revision>\n  </page>\n'
    )


HEADER = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">\n'
    "  <siteinfo>\n    <sitename>Wikipedia</sitename>\n  </siteinfo>\n"
)
ADA = """{{Short description|Mathematician}}
{{Infobox person
| name = Ada Lovelace
| birth_date = {{birth date|1815|12|10|df=y}}
| known_for = {{hlist|[[Mathematics]]|[[Computing]]}}
}}
[[File:Ada.jpg|thumb|A ''portrait'' of [[Ada Lovelace|Ada]], {{circa|1840}}]]
'''Augusta Ada King, Countess of Lovelace''' ({{née|Byron}}; {{IPAc-en|eɪ|d|ə}};
10 December 1815 – 27 November 1852) was an [[English people|English]] [[mathematician]].<ref name="odnb">{{cite book |
url=http://x.org/a|b }}</ref><!-- check -->
She is known for her work on the ''[[Analytical Engine]]''.<ref name="odnb" />

The machine was {{convert|5|m|ft}} long &ndash; {{lang|fr|'''très grande'''}} &mdash; and {{nowrap|never built}}.
It had a [https://example.org/mill mill].

== Work ==
* A list item that is no running text at all
# Another one that is numbered
; Term
: An indented remark that is left out too

{| class="wikitable"
! A !! B
|-
| {{flag|UK}} || a cell {| nested |} of a table
|}
In 1842 she translated an article by [[Luigi Menabrea]]<sup>a</sup> and added
notes {{which|date=May 2020}} of her own.<br/>They are longer.

<gallery>
File:A.jpg|A picture in a gallery with words
</gallery>
Too short.

[[Category:Mathematicians]]
[[fr:Ada Lovelace]]
"""
ADA_TEXT = [
    "Augusta Ada King, Countess of Lovelace (10 December 1815 – 27 November 1852) was an English mathematician. She is "
    "known for her work on the Analytical Engine.",
    "The machine was 5 m long – très grande — and never built. It had a mill.",
    "In 1842 she translated an article by Luigi Menabreaa and added notes of her own. They are longer.",
]


def write_dump(folder: Path, pages: list[str], name: str = "toywiki-20260901", per_stream: int = 2) -> Path:
    """A multistream dump: the header, some pages and the end are compressed each by itself."""
    streams = [HEADER, *("".join(pages[at : at + per_stream]) for at in range(0, len(pages), per_stream))]
    path = folder / f"{name}-pages-articles-multistream.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(stream.encode()) for stream in [*streams, "</mediawiki>"]))
    return path


def article(number: int) -> str:
    return page(number, f"Article {number}", f"This is the running text of article number {number}.\n\n" * 3)


PAGES = [
    page(1, "Ada Lovelace", ADA),
    page(2, "Countess of Lovelace", "#REDIRECT [[Ada Lovelace]]", redirect="Ada Lovelace"),
    page(3, "Talk:Ada Lovelace", "This page is in another namespace than articles are.", namespace=1),
    page(4, "Lovelace", "Lovelace may refer to many things and people.\n* [[Ada Lovelace]]\n{{disambiguation}}"),
    page(5, "Mercury (disambiguation)", "Mercury may refer to many things and people too."),
    page(6, "List of things", "* nothing but\n* a list"),
    *map(article, range(7, 20)),
]


def documents_of(folder: Path) -> list[Document]:
    return [
        document
        for path in sorted(folder.glob("*.parquet"))
        for group in document_groups(path)
        for document in read_group(group)
    ]


def test_a_dump_becomes_plain_documents(tmp_path: Path) -> None:
    count = convert_dump(write_dump(tmp_path, PAGES), tmp_path / "documents")
    documents = documents_of(tmp_path / "documents")
    assert count == len(documents) == 14
    assert documents[0] == Document("toywiki-20260901/1", "Ada Lovelace", ADA_TEXT)
    assert [document.title for document in documents[1:]] == [f"Article {number}" for number in range(7, 20)]
    assert documents[1].paragraphs == ["This is the running text of article number 7."] * 3


def test_parts_done_by_several_processes_hold_the_same_and_finished_ones_are_kept(tmp_path: Path) -> None:
    dump = write_dump(tmp_path, PAGES)
    convert_dump(dump, tmp_path / "whole")
    convert_dump(dump, tmp_path / "parts", processes=2, part_bytes=700)
    files = sorted((tmp_path / "parts").glob("*.parquet"))
    assert len(files) > 2
    assert documents_of(tmp_path / "parts") == documents_of(tmp_path / "whole")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[1].unlink()
    convert_dump(dump, tmp_path / "parts", part_bytes=700)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert {path for path in files if before[path][0] != after[path][0]} == {files[1]}
    assert before[files[1]][1] == after[files[1]][1]
    with pytest.raises(DataError, match=r"parts: holds documents of .*toywiki.*give another --output"):
        convert_dump(dump, tmp_path / "parts", part_bytes=800)


def test_a_dump_in_one_stream_or_cut_anywhere_is_read_too(tmp_path: Path) -> None:
    dump = write_dump(tmp_path, PAGES)
    convert_dump(dump, tmp_path / "multistream")
    xml = bz2.decompress(dump.read_bytes())
    for name, blocks in {"one": [xml], "anywhere": [xml[:1500], xml[1500:4000], xml[4000:]]}.items():
        path = tmp_path / f"toywiki-20260901-pages-articles-{name}.xml.bz2"
        path.write_bytes(b"".join(map(bz2.compress, blocks)))
        convert_dump(path, tmp_path / name, part_bytes=100)
        assert documents_of(tmp_path / name) == documents_of(tmp_path / "multistream")


def test_a_corrupt_dump_is_named(tmp_path: Path) -> None:
    dump = write_dump(tmp_path, PAGES)
    whole = dump.read_bytes()
    streams = [match.start() for match in re.finditer(b"BZh91AY&SY", whole)]
    middle = streams[4]
    for broken, problem in (
        (whole[: streams[4]], "is cut off, its last stream does not end with </mediawiki>"),
        (whole[: streams[4] + 50], "corrupt"),
        (whole[:middle] + bytes(20) + whole[middle + 20 :], "bytes 0 to .*: corrupt or no wiki dump"),
        (bz2.compress(b"<html></body>"), "bytes 0 to .*: corrupt or no wiki dump"),
        (bz2.compress(b"<mediawiki><page><ns>0</ns></page></mediawiki>"), "no wiki dump"),
        (b"PK\x03\x04", "is no bzip2 file"),
        (b"", "is empty"),
        (b"".join(map(bz2.compress, (HEADER.encode(), b"</mediawiki>"))), "holds no article"),
    ):
        dump.write_bytes(broken)
        with pytest.raises(DataError, match=rf"toywiki-.*xml\.bz2.*{problem}"):
            convert_dump(dump, tmp_path / str(len(broken)))


@given(st.text(alphabet="ab c\n{}[]|='<>/&;:*#!-r ef", max_size=120))
def test_no_wikitext_breaks_the_extractor_or_leaves_line_breaks(wikitext: str) -> None:
    for paragraph in paragraphs_of(wikitext):
        assert "\n" not in paragraph
        assert "\0" not in paragraph
        assert paragraph == paragraph.strip()


def test_the_latest_dump_is_found_by_its_published_sums(server: FileServer, client: httpx.Client) -> None:
    digest, other = "a" * 40, "b" * 40
    server.files["/enwiki/latest/enwiki-latest-sha1sums.txt"] = (
        f"{other}  enwiki-20260901-pages-articles.xml.bz2\n"
        f"{other}  enwiki-20260901-pages-articles-multistream-index.txt.bz2\n"
        f"{digest}  enwiki-20260901-pages-articles-multistream.xml.bz2\n"
    ).encode()
    url, checksum = find_dump(client, server.url + "/", "enwiki", "latest")
    assert url == f"{server.url}/enwiki/20260901/enwiki-20260901-pages-articles-multistream.xml.bz2"
    assert checksum == Checksum("sha1", digest)
    with pytest.raises(DownloadError, match=r"20260801-sha1sums\.txt"):
        find_dump(client, server.url, "enwiki", "20260801")
    server.files["/enwiki/20261001/enwiki-20261001-sha1sums.txt"] = b""
    with pytest.raises(DownloadError, match="--date 20261001 complete"):
        find_dump(client, server.url, "enwiki", "20261001")


def test_the_wikipedia_command_downloads_checks_and_converts(server: FileServer, tmp_path: Path) -> None:
    dump = write_dump(tmp_path, PAGES)
    server.files[f"/toywiki/20260901/{dump.name}"] = dump.read_bytes()
    digest = hashlib.sha1(dump.read_bytes()).hexdigest()
    server.files["/toywiki/latest/toywiki-latest-sha1sums.txt"] = f"{digest}  {dump.name}\n".encode()
    command = [
        *(sys.executable, "-m", "training.data", "wikipedia", "--wiki", "toywiki", "--mirror", server.url),
        *("--downloads", str(tmp_path / "downloads"), "--output", str(tmp_path / "documents"), "--processes", "2"),
    ]
    server.break_after = [100_000, 500]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'documents'}: 14 documents\n"
    assert (tmp_path / "downloads" / dump.name).read_bytes() == dump.read_bytes()


# Books


BOOK = """\ufeffThe Project Gutenberg eBook of {title}

This ebook is for the use of anyone anywhere in the United States.

Title: {title}

Author: Somebody

*** START OF THE PROJECT GUTENBERG EBOOK {title} ***

Produced by Somebody Else and the Distributed Proofreaders

CHAPTER I

It was a _very_ fine morning,[1] and the
river ran as it always had run.

[Illustration: A river in the morning, by nobody]

The second paragraph of this book is short.

*** END OF THE PROJECT GUTENBERG EBOOK {title} ***

Section 1. General Terms of Use and Redistributing Project Gutenberg electronic works
"""


def main(command: Sequence[str]) -> None:
    """`bertqa train data`, in this process; raises what it says where it fails."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = status(app, command)
    if code:
        raise SystemExit(said.getvalue())


def gutenberg(server: FileServer, **books_by_id: str) -> None:
    rows = ["Text#,Type,Issued,Title,Language,Authors,Subjects,LoCC,Bookshelves"]
    rows += ["9,Sound,2003,A reading,en,,,,", "12,Text,2003,Ein Buch,de,,,,"]
    for name, text in books_by_id.items():
        number = name.removeprefix("b")
        rows.append(f'{number},Text,2003,"A title, with a comma",en,,,,')
        server.files[f"/cache/epub/{number}/pg{number}.txt"] = text.replace("\n", "\r\n").encode()
    server.files["/cache/epub/feeds/pg_catalog.csv"] = "\r\n".join(rows).encode()


def test_books_come_without_licence_credits_and_headings(server: FileServer, tmp_path: Path) -> None:
    gutenberg(server, b11=BOOK.format(title="A River"), b10=BOOK.format(title="A Lake"), b13="<html>no book</html>")
    del server.files["/cache/epub/10/pg10.txt"]
    command = ["books", "--mirror", server.url, "--downloads", str(tmp_path), "--wait", "0", "--count", "3"]
    main([*command, "--output", str(tmp_path / "documents")])
    expected = Document(
        "gutenberg/11",
        "A River",
        [
            "It was a very fine morning, and the river ran as it always had run.",
            "The second paragraph of this book is short.",
        ],
    )
    assert documents_of(tmp_path / "documents") == [expected]  # 10 is not on the server, and 13 no book
    requests = len(server.requests)
    main([*command, "--output", str(tmp_path / "again"), "--ids", "11"])
    assert documents_of(tmp_path / "again") == [expected]
    assert len(server.requests) == requests


@pytest.mark.parametrize(("book", "problem"), [("10", "404"), ("13", r"START OF")])
def test_a_book_that_was_asked_for_must_be_there(server: FileServer, tmp_path: Path, book: str, problem: str) -> None:
    gutenberg(server, b13="<html>no book</html>")
    command = ["books", "--mirror", server.url, "--downloads", str(tmp_path), "--wait", "0", "--ids", book]
    with pytest.raises(SystemExit, match=problem):
        main([*command, "--output", str(tmp_path / "documents")])
    assert not list((tmp_path / "documents").glob("*.parquet"))


def test_an_older_book_in_latin_1_is_read_too(tmp_path: Path) -> None:
    text = BOOK.format(title="Café").replace("THE PROJECT", "THIS PROJECT").replace("fine", "médiocre")[1:]
    (tmp_path / "pg1.txt").write_bytes(text.encode("latin-1"))
    document = books.gutenberg_document("1", tmp_path / "pg1.txt")
    assert document.title == "Café"
    assert document.paragraphs[0].startswith("It was a very médiocre morning")


def test_another_source_is_a_line_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shelf:
        def __init__(self, client: httpx.Client, folder: Path, mirror: str | None, wait: float) -> None:
            self.folder = folder

        def identity(self) -> dict[str, object]:
            return {"origin": "shelf"}

        def find(self, language: str, count: int) -> list[str]:
            return ["one", "two"][:count]

        def read(self, book: str) -> Document:
            return Document(book, book, [f"{language_of(self.folder)} book {book}"])

    def language_of(folder: Path) -> str:
        return folder.name

    monkeypatch.setitem(books.SOURCES, "shelf", Shelf)
    main(["books", "--source", "shelf", "--output", str(tmp_path / "out"), "--downloads", str(tmp_path)])
    assert [document.id for document in documents_of(tmp_path / "out")] == ["one", "two"]


# Own text


def test_the_articles_of_a_squad_file_are_documents_of_paragraphs_that_stand_once(tmp_path: Path) -> None:
    def paragraph(context: str, *ids: str) -> dict[str, object]:
        answers = [{"text": "A", "answer_start": 0}]
        return {"context": context, "qas": [{"id": name, "question": "Who?", "answers": answers} for name in ids]}

    articles = {"Ada_Lovelace": [paragraph("A first\none.", "1", "2"), paragraph("A second.", "3")], "Bath": []}
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    assert convert_articles(path, tmp_path / "out") == 1
    assert documents_of(tmp_path / "out") == [Document("Ada_Lovelace", "Ada Lovelace", ["A first one.", "A second."])]
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"bertqa: error: .*squad\.json: .*data"):
        main(["articles", str(path), "--output", str(tmp_path / "other")])


def test_a_folder_of_text_is_a_document_for_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("\ufeffOne line\nand the next.\n\n \t\nA second paragraph.\n", encoding="utf-8")
    (folder / "b" / "c.txt").write_text("Another document.", encoding="utf-8")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "other.md").write_text("not text")
    assert convert_text(folder, tmp_path / "out", "file") == 2
    assert documents_of(tmp_path / "out") == [
        Document("a.txt", "a", ["One line and the next.", "A second paragraph."]),
        Document("b/c.txt", "c", ["Another document."]),
    ]


def test_blank_lines_may_separate_documents_as_in_berts_own_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First sentence.\nSecond one.\n\nNext document.\n")
    assert convert_text(tmp_path, tmp_path / "out", "blank-line") == 2
    assert [document.paragraphs for document in documents_of(tmp_path / "out")] == [
        ["First sentence.", "Second one."],
        ["Next document."],
    ]


def test_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        convert_text(tmp_path, tmp_path / "out", "file")
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="files are empty"):
        convert_text(tmp_path, tmp_path / "out", "file")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 3"):
        convert_text(tmp_path, tmp_path / "out", "file")


@settings(max_examples=25)
@given(st.lists(st.lists(st.text(min_size=1, alphabet="a é漢😀\n", max_size=9), max_size=4), max_size=12))
def test_documents_are_read_as_they_were_written(texts: list[list[str]]) -> None:
    documents = [Document(str(number), f"title {number}", paragraphs) for number, paragraphs in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.parquet"
        written = write_documents(path, documents)
        kept = [document for document in documents if document.paragraphs]
        assert written == len(kept)
        assert documents_of(Path(folder)) == kept
        assert [path.name for path in Path(folder).iterdir()] == ["documents.parquet"]


def test_row_groups_hold_about_a_megabyte(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.parquet", (Document(str(n), "", ["x" * 100_000]) for n in range(25)))
    assert [group.documents for group in document_groups(tmp_path / "a.parquet")] == [11, 11, 3]


def test_a_folder_of_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds Parquet files without a documents\.json"):
        open_output(tmp_path, {"origin": "text"})
    with pytest.raises(DataError, match=r"mine\.parquet: not readable"):
        document_groups(tmp_path / "mine.parquet")


# SQuAD and GLUE


def archive(folder: str, **files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, text in files.items():
            file.writestr(f"{folder}/{name}.tsv", text)
            file.writestr(f"{folder}/original/{name}.tsv", "raw")
        file.writestr(f"__MACOSX/{folder}/._train.tsv", "not a table")
    return data.getvalue()


def test_squad_is_downloaded_and_checked(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(benchmarks.SQUAD) == {
        f"{part}-v{version}.json" for part in ("train", "dev") for version in ("1.1", "2.0")
    }
    server.files |= {f"/{name}": name.encode() for name in benchmarks.SQUAD}
    command = ["squad", "--mirror", server.url, "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"bertqa: error: .*train-v1\.1\.json.*should be sha256:3527663986b8"):
        main(command)
    right = {name: hashlib.sha256(name.encode()).hexdigest() for name in benchmarks.SQUAD}
    monkeypatch.setattr(benchmarks, "SQUAD", right)
    main(command)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in right}


def test_glue_is_unpacked_and_mrpc_laid_out_as_the_other_tasks(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = archive("RTE", train="index\tsentence1\n0\ta\n", dev="d", test="t")
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    train = header + '1\t10\t11\tHe said "no.\tHe said no.\r\n0\t12\t13\tYes.\tNo.\r\n'
    test = header + "1\t20\t21\tA.\tB.\r\n"
    contents = [train.encode(), test.encode(), b"12\t13\n"]
    server.files["/glue/data/RTE.zip"] = zipped
    server.files |= {f"/{address}": data for address, data in zip(benchmarks.MRPC, contents, strict=True)}
    hashes = [hashlib.sha256(data).hexdigest() for data in contents]
    monkeypatch.setattr(benchmarks, "MRPC", dict(zip(benchmarks.MRPC, hashes, strict=True)))
    monkeypatch.setitem(benchmarks.GLUE, "RTE", ("glue/data/RTE.zip", hashlib.sha256(zipped).hexdigest()))
    command = ["glue", "--mirror", server.url, "--output", str(tmp_path), "--tasks", "RTE,MRPC"]
    main(command)
    assert {path.name: path.read_text() for path in (tmp_path / "RTE").iterdir()} == {
        "train.tsv": "index\tsentence1\n0\ta\n",
        "dev.tsv": "d",
        "test.tsv": "t",
    }
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    assert {path.name: path.read_text() for path in (tmp_path / "MRPC").iterdir()} == {
        "train.tsv": header + '1\t10\t11\tHe said "no.\tHe said no.\n',
        "dev.tsv": header + "0\t12\t13\tYes.\tNo.\n",
        "test.tsv": header.replace("Quality", "index") + "0\t20\t21\tA.\tB.\n",
    }
    requests = len(server.requests)
    main(command)
    assert len(server.requests) == requests


def test_an_archive_or_table_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "CoLA.zip").write_bytes(archive("SST-2", train="x"))
    with pytest.raises(DataError, match=r"CoLA\.zip: holds no CoLA/\*\.tsv"):
        benchmarks.unpack(tmp_path / "CoLA.zip", "CoLA", tmp_path)
    for name, text in (("train", "a\tb\n"), ("test", "\n"), ("ids", "\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="train:1: 2 columns where MRPC has 5"):
        benchmarks.write_mrpc(tmp_path / "train", tmp_path / "test", tmp_path / "ids", tmp_path)


def test_every_checksum_is_a_sha256() -> None:
    digests = [
        *benchmarks.SQUAD.values(),
        *benchmarks.MRPC.values(),
        *(digest for _, digest in benchmarks.GLUE.values()),
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests) == 14
