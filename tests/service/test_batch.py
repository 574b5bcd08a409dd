"""Test batch jobs, in this process and on Ray, against a real Triton with a model that can misbehave."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertqa.cli.command import parse, status
from bertqa.graphemes import OffsetUnit
from bertqa.manifest import Bundle, Manifest, sha256_of
from bertqa.repository import Repository
from bertqa.spans import Logits
from bertqa.squad import Example, Reference, as_squad
from bertqa.windows import INPUT_NAMES, OUTPUT_NAMES, Window
from engine_builder.build import BuildOptions, build
from engine_builder.publish import NO_CACHE
from service.app import create_app
from service.commands.batch import BatchOptions, app, worker
from service.commands.batch import job as batch_job
from service.commands.batch.errors import BatchRefused
from service.commands.batch.journal import JOURNAL_FILE, Journal
from service.commands.batch.parquet import ANSWER_COLUMNS, MODEL_KEY, PartReader
from service.commands.batch.parts import Asking, Part, Receipt
from service.commands.batch.worker import PartAnswerer
from service.runtime.triton_process import EmbeddedTriton
from service.settings import Settings
from service.triton.channels import EngineFactory
from service.triton.errors import EngineUnavailable
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import ROOT
from tests.support.ports import triton_ports
from tests.support.repositories import publish_toy_bundle
from tests.support.servers import serving
from tests.support.toy_model import FakeEngine
from tests.support.waiting import until

ASKING = Asking(
    question_column="question",
    context_column="context",
    id_column="id",
    max_answer_tokens=30,
    no_answer=False,
    offset_unit="codepoint",
)
MODEL = f"""
import ctypes
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as triton

class TritonPythonModel:
    '''As the tests' FakeEngine: what is «marked» is the answer. RAISE and NAN are tokens, and BROKEN is a file.'''

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        if Path(BROKEN).exists():
            raise ValueError("no such bucket")
        time.sleep(0.002)
        ids = np.from_dlpack(triton.get_input_tensor_by_name(request, {INPUT_NAMES[0]!r})).copy()
        slope = np.linspace(-4, -5, ids.shape[1], dtype=np.float32)[None]
        start, end = slope.copy(), slope.copy()
        start[0, 0] = end[0, 0] = 0
        found = ids[0].tolist()
        if RAISE in found:
            raise ValueError("no such bucket")
        if NAN in found:
            start[0, 5] = np.nan
        if OPENING in found and CLOSING in found[found.index(OPENING) + 2 :]:
            start[0, found.index(OPENING) + 1] = 8
            end[0, found.index(CLOSING, found.index(OPENING) + 2) - 1] = 8
        pairs = zip({OUTPUT_NAMES}, (start, end))
        return triton.InferenceResponse([self.tensor(name, value) for name, value in pairs])

    def tensor(self, name, value):  # as in the engine's own model.py, which says why
        capsule = value.__dlpack__()
        tensor = triton.Tensor.from_dlpack(name, capsule)
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), USED)
        return tensor

USED = b"used_dltensor"
"""
RAISE, NAN, CRASH = "^", "`", "~"
"""Characters of a text that make the model do so."""


def sign(bundle: Bundle, text: str) -> int:
    """Token id of a text that is one token."""
    return int(bundle.tokenizer("?", text).windows[0].input_ids[0, 3])


def config(identity: str) -> str:
    inputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_INT32 dims: [ -1 ] }}' for name in INPUT_NAMES)
    outputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }}' for name in OUTPUT_NAMES)
    # The queue is shorter than what a worker has in flight, so that some of it is refused at first.
    return f"""
        name: "bert_qa" backend: "python" max_batch_size: 1
        input [ {inputs} ] output [ {outputs} ]
        instance_group [ {{ count: 2 kind: KIND_CPU }} ]
        dynamic_batching {{ default_queue_policy {{ timeout_action: REJECT max_queue_size: 16 }} }}
        parameters {{ key: "identity_7" value {{ string_value: "{identity}" }} }}
    """


class Product:
    """A repository, and a Triton that serves it."""

    def __init__(self, directory: Path, bundle: Bundle) -> None:
        self.directory = directory
        self.repository = directory / "repository"
        self.bundle = publish_toy_bundle(Repository(self.repository), bundle)
        self.broken = directory / "broken"
        ids = {name: sign(bundle, text) for name, text in _SIGNS.items()}
        constants = "".join(f"{name} = {number}\n" for name, number in ids.items()) + f"BROKEN = {str(self.broken)!r}\n"
        (self.bundle / "model.py").write_text(MODEL + constants)
        (self.bundle / NO_CACHE).write_text("so that Triton loads it once")
        self.identity = Manifest.read(self.bundle / "manifest.json").identity
        (self.bundle.parent / "config.pbtxt").write_text(config(self.identity))

    def triton(self) -> EmbeddedTriton:
        return EmbeddedTriton(self.repository, ports=triton_ports(), log_dir=self.directory / "logs")


_SIGNS = {"OPENING": "«", "CLOSING": "»", "RAISE": RAISE, "NAN": NAN}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Product:
    return Product(tmp_path_factory.mktemp("product"), bundle)


@pytest.fixture(scope="module")
def server(product: Product) -> Iterator[EmbeddedTriton]:
    with product.triton() as started:
        yield started


def rows(*pairs: tuple[str | bytes | None, str | bytes | None], text: Any = None) -> pa.Table:
    """Questions and contexts as a table with ids; bytes become strings unchecked, as a careless writer's would."""

    def column(values: list[str | bytes | None]) -> pa.Array:
        raw = [value.encode() if isinstance(value, str) else value for value in values]
        plain = pa.array(raw, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(plain), plain.buffers()).cast(text or pa.string())

    questions, contexts = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
    ids = pa.array([f"id-{number}" for number in range(len(pairs))], pa.string())
    return pa.table({"id": ids, "question": column(questions), "context": column(contexts)})


def many(count: int) -> pa.Table:
    return rows(*(("who made it?", f"Text {number} was made by «Uber {number}» there.") for number in range(count)))


@contextlib.contextmanager
def answerer(
    product: Product,
    url: str,
    output: Path,
    asking: Asking = ASKING,
    patience_s: float = 60.0,
    engine: EngineFactory | None = None,
    **settings: Any,
) -> Iterator[PartAnswerer]:
    at = Settings(triton_url=url or "none", **settings)
    made = PartAnswerer(product.bundle, at, asking, output, patience_s, engine=engine)
    try:
        yield made
    finally:
        made.close()


def answer_part(made: PartAnswerer, part: Part) -> Receipt:
    return Receipt(**made({"name": part.name, "source": part.source, "first": part.first, "rows": part.rows}))


def answer_table(
    product: Product, url: str, directory: Path, table: pa.Table, **options: Any
) -> tuple[Receipt, pa.Table]:
    source = directory / "rows.parquet"
    pq.write_table(table, source)
    part = Part(name="part.parquet", source=str(source), first=0, rows=table.num_rows)
    with answerer(product, url, directory, **options) as made:
        receipt = answer_part(made, part)
    assert not receipt.stopped, receipt.stopped
    assert receipt.sha256 == sha256_of(directory / part.name)
    return receipt, pq.read_table(directory / part.name)


# A part


@pytest.mark.triton
def test_rows_are_answered_as_the_service_answers(product: Product, server: EmbeddedTriton, tmp_path: Path) -> None:
    long = "Nothing is said here. " * 40
    table = rows(
        ("Who made it?", "Horovod was made at «Uber»."),
        ("누가 만들었나요?", "「Horovod」는 서울에서 «漢字 회사» 가 만들었다. 😀"),
        ("who?", f"{long}It was «an e\u0301migre\u0301 of Uber». {long}"),
        ("who " * 30, "It was «Uber», a company; the question is cut."),
        ("Who?", "Nobody says."),
        ("who?", "\u200b\u200b"),
        ("Who?", "x" * 5000 + " «y» "),
        ("Who is <b>&amp;?", "tab\t«new\nline\u2028and\x00nul»"),
    )
    with serving(create_app(Settings(triton_url=server.url, repository=product.repository))) as url:
        cases: list[tuple[bool, OffsetUnit]] = [(False, "codepoint"), (True, "utf16")]
        for no_answer, unit in cases:
            directory = tmp_path / unit
            directory.mkdir()
            asking = replace(ASKING, no_answer=no_answer, offset_unit=unit)
            receipt, found = answer_table(product, server.url, directory, table, asking=asking)
            assert (receipt.rows, receipt.errors) == (table.num_rows, 0)
            assert found["id"].to_pylist() == table["id"].to_pylist()
            for asked, row in zip(table.to_pylist(), found.to_pylist(), strict=True):
                body = {"question": asked["question"], "context": asked["context"]}
                response = httpx.post(
                    f"{url}/v1/answer", json={**body, "no_answer": no_answer, "offset_unit": unit}, trust_env=False
                )
                reply = response.json()
                best = reply["answers"][0] if reply["answers"] else dict.fromkeys(("text", "start", "end", "score"))
                assert row == {
                    "id": asked["id"],
                    "answer": best["text"],
                    **{name: best[name] for name in ("start", "end", "score")},
                    **{name: reply[name] for name in ("has_answer", "null_score", "windows", "truncated")},
                    "error": None,
                }
            assert found["answer"].null_count == (2 if no_answer else 1)
    assert pq.read_schema(directory / "part.parquet").metadata[MODEL_KEY].decode() == product.identity


@pytest.mark.triton
def test_a_built_engine_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    text = "Ada Lovelace wrote the first program in London. "
    example = Example("0", "Ada", "Who wrote it?", text, (Reference("Ada Lovelace", 0),))
    (checkpoint / "gate.json").write_text(json.dumps(as_squad([example])))
    repository = tmp_path / "repository"
    build(
        BuildOptions(
            checkpoint=str(checkpoint), target="cpu", precision="fp32", repository=repository, instances=2, threads=1
        )
    )
    bundle = Repository(repository).open()
    table = rows(
        *(("Where was it written?", f"{text * (number % 50)}Horovod was made at Uber.") for number in range(99))
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    part = Part(name="part.parquet", source=str(tmp_path / "rows.parquet"), first=0, rows=99)
    with EmbeddedTriton(repository, ports=triton_ports(), log_dir=tmp_path) as triton:
        receipts = []
        for _ in range(2):
            at = Settings(triton_url=triton.url)
            directory = Repository(repository).directory(bundle.model, bundle.version)
            with contextlib.closing(PartAnswerer(directory, at, ASKING, tmp_path, 60.0)) as made:
                receipts.append(answer_part(made, part))
    assert (receipts[0].rows, receipts[0].errors) == (99, 0)
    assert receipts[0] == receipts[1]
    found = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert max(row["windows"] for row in found) > 3
    for asked, row in zip(table.to_pylist(), found, strict=True):
        assert asked["context"][row["start"] : row["end"]] == row["answer"]


@pytest.mark.triton
def test_a_row_that_cannot_be_answered_says_which_field_is_wrong_and_the_others_are_answered(
    product: Product, server: EmbeddedTriton, tmp_path: Path
) -> None:
    good = "It was made by «Uber»."
    cases: list[tuple[Any, Any, str | None]] = [
        ("who?", good, None),
        (None, good, "question: must not be null"),
        ("who?", None, "text: must not be null"),
        ("", good, "question: must not be empty"),
        ("who?", "", "text: must not be empty"),
        (" \n", good, "question: must contain more than white space"),
        ("who?", "\u3000", "text: must contain more than white space"),
        ("?" * 1001, good, "question: must be at most 1,000 characters; got 1,001"),
        ("who?", "x" * 101, "text: must be at most 100 characters together; got 101"),
        (b"who\xff?", good, "question: not valid UTF-8 at byte 3"),
        ("who?", b"\xed\xa0\x80 lone surrogate", "text: not valid UTF-8 at byte 0"),
        ("who?", f"This {RAISE} is too much for it", "engine: The engine failed with INTERNAL: "),
        ("who?", f"This {NAN} makes nonsense of it", "engine: The engine's output 'start_logits' holds NaN"),
        ("who?", good, None),
    ]
    table = rows(*(case[:2] for case in cases)).rename_columns(["id", "question", "text"])
    asking = replace(ASKING, context_column="text")
    receipt, found = answer_table(
        product, server.url, tmp_path, table, asking=asking, max_context_chars=100, patience_s=30
    )
    assert receipt.errors == len(cases) - 2
    assert found.schema.names == ["id", *ANSWER_COLUMNS.names]
    assert found["id"].to_pylist() == table["id"].to_pylist()
    for (_, _, error), row in zip(cases, found.to_pylist(), strict=True):
        if error is None:
            assert (row["answer"], row["error"]) == ("Uber", None)
        else:
            assert row.pop("error").startswith(error)
            assert row.pop("id")
            assert set(row.values()) == {None}


class MortalEngine(FakeEngine):
    """Dies of a window with `CRASH`, and is away for a moment then; what else it computes dies with it."""

    def __init__(self, product: Product, crash: int) -> None:
        super().__init__(product.identity)
        self.crash = crash
        self.deaths = 0
        self.away_until = 0.0

    async def predict(self, windows: Sequence[Window], *, deadline: float) -> list[Logits]:
        deaths = self.deaths
        if time.monotonic() < self.away_until:
            raise EngineUnavailable("Connection refused")
        await asyncio.sleep(0.002)
        if any(self.crash in window.input_ids for window in windows):
            self.deaths += 1
            self.away_until = time.monotonic() + 0.2
        if self.deaths > deaths:
            raise EngineUnavailable("Socket closed")
        return await super().predict(windows, deadline=deadline)


@pytest.mark.triton
def test_a_text_that_kills_the_engine_costs_its_own_row_alone(product: Product, bundle: Bundle, tmp_path: Path) -> None:
    asked = many(300).to_pylist()
    asked[100]["context"] = f"Never ask {CRASH} this"
    engine = MortalEngine(product, sign(bundle, CRASH))
    receipt, found = answer_table(product, "", tmp_path, pa.Table.from_pylist(asked), engine=engine)
    assert receipt.errors == 1
    assert engine.deaths == 4
    assert found["error"].to_pylist()[100] == "engine: Socket closed"
    answers = found["answer"].to_pylist()
    assert answers[:100] + answers[101:] == [f"Uber {number}" for number in range(300) if number != 100]


@pytest.mark.triton
def test_every_type_of_text_and_any_type_of_id(product: Product, server: EmbeddedTriton, tmp_path: Path) -> None:
    pairs = [("who?", "It was «Uber»."), (None, "x"), ("who?", "It was «Horovod».")]
    dictionary = pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), dictionary):
        table = rows(*pairs, text=None if kind == dictionary else kind)
        if kind == dictionary:
            for number, name in ((1, "question"), (2, "context")):
                table = table.set_column(number, name, table[name].dictionary_encode())
        ids = pa.array([{"page": 1}, {"page": None}, None], pa.struct([("page", pa.int16())]))
        assert table.schema.field("question").type == kind
        receipt, found = answer_table(product, server.url, tmp_path, table.set_column(0, "id", ids))
        assert (receipt.errors, found["answer"].to_pylist()) == (1, ["Uber", None, "Horovod"])
        assert found["id"].type == ids.type
        assert found["id"].to_pylist() == ids.to_pylist()


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    texts = [f"{number} {hashlib.sha512(str(number).encode()).hexdigest()}" * 4 for number in range(30_000)]
    table = rows(*(("who?", text) for text in texts))
    pq.write_table(table, source, row_group_size=len(texts))
    assert table.nbytes > 15_000_000
    before = pa.total_allocated_bytes()
    reader = PartReader(Part(name="part.parquet", source=str(source), first=25_000, rows=2_000), ASKING)
    held = [pa.total_allocated_bytes() - before for _ in reader]
    assert len(held) == 2_000
    assert max(held) < 8_000_000  # pages of the file, of about a megabyte each


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), max_size=5), st.data())
def test_a_part_is_its_slice_of_the_file_whatever_the_row_groups(groups: list[int], data: st.DataObject) -> None:
    import tempfile

    total = sum(groups)
    first = data.draw(st.integers(0, total))
    wanted = data.draw(st.integers(0, total - first))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.parquet"
        table = many(total)
        with pq.ParquetWriter(path, table.schema) as writer:
            start = 0
            for size in groups:
                writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
                start += size
        part = Part(name="part.parquet", source=str(path), first=first, rows=wanted)
        for asking in (ASKING, replace(ASKING, id_column=None)):
            reader = PartReader(part, asking)
            texts = [context.decode() for _, context in reader if context]
            assert texts == table["context"].to_pylist()[first : first + wanted]
            ids = table["id"].to_pylist() if asking.id_column else list(range(total))
            assert reader.ids.to_pylist() == ids[first : first + wanted]
            assert reader.id_field.type == reader.ids.type


@pytest.mark.triton
def test_an_engine_that_is_away_for_a_while_is_waited_for(product: Product, tmp_path: Path) -> None:
    with product.triton() as triton:
        first = triton.pid
        assert first
        timer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
        timer.start()
        receipt, found = answer_table(product, triton.url, tmp_path, many(1500))  # takes 1.5 s at least
        timer.join()
        assert triton.pid != first
    assert receipt.errors == 0
    assert found["answer"].to_pylist() == [f"Uber {number}" for number in range(1500)]


@pytest.mark.triton
def test_an_engine_that_stays_away_or_broken_stops_the_job_and_nothing_is_written(
    product: Product, server: EmbeddedTriton, tmp_path: Path
) -> None:
    source = tmp_path / "rows.parquet"
    pq.write_table(many(50), source)
    part = Part(name="part.parquet", source=str(source), first=0, rows=50)
    with answerer(product, "127.0.0.1:1", tmp_path, patience_s=0.5) as made:
        receipt = answer_part(made, part)
    assert receipt.stopped.startswith("part.parquet: the engine has answered no question for ")
    assert "No connection to Triton at 127.0.0.1:1" in receipt.stopped
    product.broken.touch()
    try:
        with answerer(product, server.url, tmp_path, patience_s=0.5) as made:
            receipt = answer_part(made, part)
            assert receipt.stopped.startswith("part.parquet: the engine has answered no question for ")
            assert os.listdir(tmp_path) == ["rows.parquet"]
            product.broken.unlink()
            assert answer_part(made, part).rows == 50  # the same worker goes on
    finally:
        product.broken.unlink(missing_ok=True)


def test_rows_wait_while_the_pipeline_does_not_admit_them(
    product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(product.identity)
    engine.delay_s = 0.02

    def one_slot(settings: Settings, at_a_time: int) -> Settings:  # a job's own settings leave room for all of its rows
        return settings.model_copy(update={"max_in_flight": 1, "max_wait_s": 0.03})

    monkeypatch.setattr(worker, "_patient", one_slot)
    _, found = answer_table(product, "", tmp_path, many(80), engine=engine, max_in_flight=8)
    assert found["error"].to_pylist() == [None] * 80
    assert engine.windows == 80  # no row was suspected of breaking the engine, which asks harmless questions too
    assert found["answer"].to_pylist() == [f"Uber {number}" for number in range(80)]


# A job


def job(product: Product, url: str, source: Path, output: Path, *flags: str) -> list[str]:
    return [
        *(f"--input={source}", f"--output={output}", f"--triton-url={url}", f"--repository={product.repository}"),
        *("--id-column=id", "--part-rows=100", "--in-flight=16", *flags),
    ]


def start(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bertqa.cli", "batch", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(output: Path) -> int:
    journal = output / JOURNAL_FILE
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def wait_for(process: "subprocess.Popen[str]", output: Path, parts: int) -> None:
    until(lambda: done(output) >= parts or process.poll() is not None, f"no {parts} parts are done", 240)
    assert process.poll() is None, process.communicate(timeout=60)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("ray::") and "Map(PartAnswerer)" in " ".join(child.cmdline())
    ]


@pytest.mark.slow
@pytest.mark.triton
def test_a_job_goes_on_after_whatever_ended_it_and_leaves_the_same_bytes(product: Product, tmp_path: Path) -> None:
    source, output, expected = tmp_path / "in", tmp_path / "out", tmp_path / "expected"
    (source / "deep.parquet").mkdir(parents=True)  # as Spark names what it writes
    expected.mkdir()
    table = many(690)
    pq.write_table(table.slice(0, 0), source / "a-empty.parquet")
    pq.write_table(table.slice(0, 630), source / "b.parquet", row_group_size=300)
    pq.write_table(table.slice(630), source / "deep.parquet" / "c.parquet")
    (source / "_ignored.parquet").write_text("of another program")
    with product.triton() as triton:
        url = triton.url
        parts = {
            0: (source / "a-empty.parquet", 0),
            1: (source / "b.parquet", 630),
            2: (source / "deep.parquet/c.parquet", 60),
        }
        with answerer(product, url, expected) as made:
            for number, (path, count) in parts.items():
                for first in range(0, max(count, 1), 40):
                    name = f"part-{number:05}-{first // 40:06}.parquet"
                    part = Part(name=name, source=str(path), first=first, rows=min(40, count - first))
                    assert not answer_part(made, part).stopped

        words = job(product, url, source, output, "--part-rows=40")
        killed = start([*words, "--workers=2"])
        try:
            wait_for(killed, output, 3)
            for worker in workers_of(killed)[:1]:
                worker.kill()
            wait_for(killed, output, 8)
            others = psutil.Process(killed.pid).children(recursive=True)
        finally:
            killed.kill()
            killed.communicate(timeout=60)
        assert len(others) > 5
        _, alive = psutil.wait_procs(others, timeout=120)
        assert not alive  # Ray ends with the job
        finished = done(output)
        with (output / JOURNAL_FILE).open("ab") as journal:
            journal.write(b'{"name": "part-0')  # cut off
        (output / ".part-00001-000009.parquet.1").write_text("half of it")
        changed, gone = sorted(output.glob("part-*"))[1:3]
        changed.write_bytes(b"PAR1")
        gone.unlink()

        last = start(words)
        printed, said = last.communicate(timeout=300)
        assert last.returncode == 0, said
        summary = json.loads(printed)
        assert f"{changed}: changed; answering its rows again" in said
        assert f"{gone}: missing; answering its rows again" in said
        assert "690/690" not in said, "no progress bar where nobody watches"
        speed = summary.pop("rows_per_second")
        assert speed > 0
        assert summary == {
            "model": product.identity,
            "files": 3,
            "rows": 690,
            "errors": 0,
            "parts": 19,
            "parts_answered_now": 19 - finished + 2,
        }
        again = batch_job.run(parse(BatchOptions, words))
        assert (again["rows"], again["parts_answered_now"]) == (690, 0)

    names = sorted(path.name for path in output.iterdir())
    assert names == [JOURNAL_FILE, *sorted(path.name for path in expected.iterdir())]
    for path in expected.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    found = pq.read_table(output)
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert found["answer"].to_pylist() == [f"Uber {number}" for number in range(690)]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process answer the parts of a job, one after the other."""

    def answered(parts: Sequence[Part], options: tuple[Any, ...], **_: object) -> Iterator[Receipt]:
        with contextlib.closing(PartAnswerer(*options)) as made:
            yield from (answer_part(made, part) for part in parts)

    monkeypatch.setattr(batch_job, "answered", answered)


@pytest.mark.triton
@pytest.mark.usefixtures("without_ray")
def test_a_job_that_was_stopped_keeps_what_is_done(
    product: Product, server: EmbeddedTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    with pq.ParquetWriter(source, many(0).schema) as writer:
        writer.write_table(many(100))
        middle = writer.file_handle.tell()
        writer.write_table(many(200).slice(100))
    whole = source.read_bytes()
    words = job(product, server.url, source, output, "--patience=0")

    product.broken.touch()
    try:
        assert status(app, words) == 1
    finally:
        product.broken.unlink()
    said = capsys.readouterr().err
    assert "bertqa: stopped: part-00000-000000.parquet: the engine has answered no question for 0 s: " in said
    assert "bertqa: finished parts are kept; run the same command again to continue" in said
    assert done(output) == 0

    source.write_bytes(whole[:middle] + bytes(500) + whole[middle + 500 :])
    assert status(app, [*words, f"--output={tmp_path / 'broken'}"]) == 1
    said = capsys.readouterr().err
    assert f"stopped: part-00000-000001.parquet: {source}: cannot be read from row 100 on: " in said
    assert done(tmp_path / "broken") == 1

    source.write_bytes(whole)
    assert status(app, words) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == done(output) * 100 == 200


def refused(words: list[str]) -> str:
    with pytest.raises(BatchRefused) as caught:
        batch_job.run(parse(BatchOptions, words))
    return str(caught.value)


@pytest.mark.triton
def test_what_cannot_be_begun_is_refused_by_name(product: Product, tmp_path: Path) -> None:
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(many(3), source)
    words = job(product, "127.0.0.1:1", source, output)
    assert "--question-column q: must be one column; " in refused([*words, "--question-column=q"])
    assert "has only id, question, context" in refused([*words, "--context-column=c"])
    assert "no such file or directory" in refused([*words, f"--input={tmp_path / 'none'}"])
    assert "has no *.parquet files" in refused([*words, f"--input={ROOT / 'docs'}"])
    (tmp_path / "broken.parquet").write_text("PAR1")
    assert "broken.parquet: not a readable Parquet file" in refused([*words, f"--input={tmp_path / 'broken.parquet'}"])
    pq.write_table(pa.table({"question": [1], "context": ["x"], "answer": [1]}), tmp_path / "numbers.parquet")
    numbers = [*words, f"--input={tmp_path / 'numbers.parquet'}"]
    assert "--question-column question: must be a text column; in " in refused(numbers)
    texts = [*numbers, "--question-column=context"]
    assert "--id-column answer: the output already has a column with this name" in refused(
        [*texts, "--id-column=answer"]
    )
    twice = pa.table([pa.array(["x"])] * 3, names=["question", "context", "context"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "has 2 of this name" in refused([*words, f"--input={tmp_path / 'twice.parquet'}"])
    inside = ["--output", str(ROOT / "docs" / "out"), "--input", str(ROOT / "docs")]
    assert "must not be inside --input" in refused([*words, *inside])
    assert f"--output {tmp_path}: must be new or belong to this job, but contains " in refused(
        [*words, f"--output={tmp_path}"]
    )
    assert not output.exists()


@pytest.mark.triton
@pytest.mark.usefixtures("without_ray")
def test_another_job_is_not_mixed_in(product: Product, server: EmbeddedTriton, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(many(3), source / "a.parquet")
    words = job(product, server.url, source, output)
    with contextlib.closing(Journal(output)):
        assert "another job is running there" in refused(words)
    status(app, words)
    assert "has asking no_answer False, but this job has True" in refused([*words, "--no-answer"])
    assert "has part_rows 100, but this job has 50" in refused([*words, "--part-rows=50"])
    pq.write_table(many(4), source / "a.parquet")
    assert "has sources 0 rows 3, but this job has 4" in refused(words)
    pq.write_table(many(3), source / "a.parquet")
    pq.write_table(many(3), source / "b.parquet")
    assert "has sources 1 name None, but this job has b.parquet" in refused(words)


def test_what_must_be_installed_is_said() -> None:
    program = "import sys; sys.modules['ray'] = None; from service.commands.batch import app, group; app()"
    command = [sys.executable, "-c", program, "--input", "a", "--output", "b"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 2
    assert "needs the package ray: pip install" in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--workers=0", "must be at least 1, not 0"),
        ("--part-rows=-1", "must be at least 1, not -1"),
        ("--max-answer-tokens=201", "must be from 1 to 200, not 201"),
        ("--patience=nan", "must be 0 or above, not nan"),
        ("--triton-url=a:1,", "must be host:port, or several separated by commas, not 'a:1,'"),
    ],
)
def test_flags_out_of_range_are_refused(flag: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(BatchOptions, ["--input=a", "--output=b", flag])
    said = capsys.readouterr().err
    assert f"Invalid value for '{flag.partition('=')[0]}'" in said
    assert f": {problem}\n" in said
