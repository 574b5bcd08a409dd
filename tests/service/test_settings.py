"""Test the settings: refused values, their messages, and that the table in the docs matches the class."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertqa.manifest import Bundle
from bertqa.repository import Repository
from service.settings import OTHERS, Settings, SettingsError, markdown_table, variable
from tests.support.paths import ROOT
from tests.support.repositories import publish_toy_bundle


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("BERTQA_MAX_BODY_BYTE", "9", "no such setting; did you mean BERTQA_MAX_BODY_BYTES?"),
        ("BERTQA_DEADLINES", "9", "no such setting; did you mean BERTQA_DEADLINE_S?"),
        ("BERTQA_QQQ", "", "no such setting; docs/operations.md lists the settings"),
        ("BERTQA_DEADLINE_S", "0", "must be a number, above 0 and at most 3600; got '0'"),
        ("BERTQA_DEADLINE_S", "nan", "must be a number, above 0 and at most 3600; got 'nan'"),
        ("BERTQA_SHUTDOWN_DELAY_S", "301", "must be a number, at least 0 and at most 300; got '301'"),
        ("BERTQA_MAX_QUESTIONS", "0", "must be a whole number, at least 1; got '0'"),
        ("BERTQA_MAX_QUESTIONS", "2.5", "must be a whole number, at least 1; got '2.5'"),
        ("BERTQA_ACCESS_LOG", "maybe", "must be true or false; got 'maybe'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "tcp", "must be one of grpc, http/protobuf; got 'tcp'"),
        ("BERTQA_TRITON_URL", "a:1,", "must be host:port, or several separated by commas; got 'a:1,'"),
        ("BERTQA_METRICS", "key", "key needs BERTQA_API_KEYS_FILE"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_its_limit(name: str, value: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment({name: value})
    assert str(refused.value) == f"{name}: {problem}"


@pytest.mark.parametrize("program", [["-m", "service"], ["-m", "uvicorn", "--factory", "service.app:create_app"]])
def test_a_misspelt_variable_ends_the_process_in_one_line(program: list[str]) -> None:
    environment = {**os.environ, "BERTQA_TRITON_ULR": "somewhere:8001"}
    command = [sys.executable, *program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert done.stderr == "bertqa: error: BERTQA_TRITON_ULR: no such setting; did you mean BERTQA_TRITON_URL?\n"


def test_a_default_model_that_is_not_there_ends_the_process_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    publish_toy_bundle(Repository(tmp_path), bundle)
    for repository, name, problem in (
        (tmp_path, "other", "BERTQA_MODEL: must be one of bert_qa; got 'other'"),
        (tmp_path / "none", "", f"{tmp_path / 'none' / 'bert_qa'}: holds no built version; run "),
    ):
        environment = {**os.environ, "BERTQA_REPOSITORY": str(repository), "BERTQA_MODEL": name}
        command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app", "--port=0"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode
        assert done.stderr.startswith(f"bertqa: error: {problem}")
        assert done.stderr.count("\n") == 1


def test_variables_of_others_are_let_be() -> None:
    links = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR")
    others = dict.fromkeys([*OTHERS, *(f"BERTQA_{each}" for each in links), "BERTQA_TRITON_SERVICE_HOST"], "tcp://x")
    assert Settings.from_environment(others) == Settings()


def test_only_from_environment_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTQA_MODEL", "other")
    assert Settings().model == ""
    assert Settings.from_environment(os.environ).model == "other"


def test_every_setting_is_in_the_docs_as_the_class_has_it() -> None:
    assert markdown_table() in (ROOT / "docs" / "operations.md").read_text("utf-8")
    for name, field in Settings.model_fields.items():
        assert field.description, f"{variable(name)} says what it is for"
