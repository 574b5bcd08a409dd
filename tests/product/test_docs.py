"""Test that everything the documentation names exists: links, headings, files, tests, commands and options."""

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import pytest
import yaml
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from bertqa.cli import app
from tests.support.pages import FENCE, PAGES, blocks
from tests.support.paths import ROOT

FOLDERS = ("bertqa", "service", "engine_builder", "training", "loadtest", "tests", "deploy", "docs", "checkpoints")
OF_THE_READER = {"checkpoints/mine"}
"""Paths in examples that the reader makes."""

SAME_AS = {
    "service": "serve",
    "engine_builder": "build",
    "loadtest.sweep": "loadtest",
    "training.data": "train data",
    "training.pretrain": "train pretrain",
    "training.finetune_squad": "train squad",
    "training.finetune_glue": "train glue",
    "training.average": "train average",
    "training.teach": "train teach",
}
"""Modules that are run by ``python -m``, and the command of ``bertqa`` that each is."""

IN_CONTAINER = {"builder-cpu": "build", "builder-gpu": "build", "batch": "batch", "bertqa": ""}
"""Services of docker-compose.yml that are run with arguments, and the command of ``bertqa`` that takes them."""

SYSTEM = {
    *("apt-get", "cd", "cp", "curl", "docker", "echo", "git", "helm", "horovodrun", "kubectl", "mkdir", "npm", "pip"),
    *("sbatch", "unzip"),
}
"""Programs that are not ours."""

_PATH = re.compile(rf"(?<![\w./~=-])(?:{'|'.join(FOLDERS)})/[\w./-]*(?:::[\w…]+)?")


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _prose(page: str) -> str:
    return FENCE.sub("", _text(page))


def _anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeated = (f"{anchor}-{number}" for number in range(1, 100))
        found.add(anchor if anchor not in found else next(each for each in repeated if each not in found))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        assert linked.is_relative_to(ROOT), f"{page} links out of the project: {target}"
        if anchor:
            assert anchor in _anchors(linked.relative_to(ROOT).as_posix()), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page: str) -> None:
    last = ""  # a bare `::test_name` means the test file that was named before
    for match in re.finditer(rf"{_PATH.pattern}|(?<=`)::[\w…]+", _text(page)):
        path, _, test = match[0].partition("::")
        path = path.rstrip(".") or last
        if path not in OF_THE_READER:
            assert (ROOT / path).exists(), f"{page} names {match[0]}"
        if path.startswith("tests/") and path.endswith(".py"):
            last = path
        if test:
            pattern = "def " + ".*".join(map(re.escape, test.split("…")))
            pattern += "" if test.endswith("…") else r"\("
            assert re.search(pattern, (ROOT / path).read_text(encoding="utf-8")), f"{page} names {path}::{test}"


def test_the_tree_of_the_readme_exists() -> None:
    (tree,) = re.findall(r"^## The tree\n\n```\n(.*?)^```$", _text("README.md"), re.MULTILINE | re.DOTALL)
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0]]
        path = "".join(folders)
        assert (ROOT / path).exists() or path == "model_repository/", f"README.md names {path}"


def _commands(page: str) -> Iterator[list[str]]:
    """The words of each command in the page's shell blocks, without assignments and keywords."""
    for block in blocks(page):
        if block.language != "sh":
            continue
        script = re.sub(r"(^|\s)#.*$", "", block.text, flags=re.MULTILINE).replace("\\\n", " ")
        reader = shlex.shlex(script, posix=True, punctuation_chars=";|&\n")
        reader.commenters, reader.whitespace, reader.whitespace_split = "", " \t", True
        words: list[str] = []
        for word in [*reader, "\n"]:
            if word.strip(";|&\n"):
                words.append(word)
                continue
            while words and (words[0] in ("do", "export", "}") or re.match(r"\w+=|\w+\(\)$|\{$", words[0])):
                del words[0]
            if words and words[0] not in ("for", "done", "pretrain"):
                yield words
            words = []


def _walk(words: list[str]) -> tuple[TyperCommand | TyperGroup, list[str]]:
    """The command of ``bertqa`` that the words name, and its arguments."""
    command = cast(TyperCommand | TyperGroup, get_command(app))
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"bertqa has no command {words[0]}"
        command, words = cast(TyperCommand | TyperGroup, command.commands[words[0]]), words[1:]
    return command, words


def _parse(words: list[str]) -> None:
    """Parse a command line of ``bertqa`` as it would be, but run nothing.

    Raises:
        TyperException: a command, an option or a value does not exist, or an argument is missing.
    """
    command, arguments = _walk(words)
    for word in arguments:  # the root's --help and --version end the process
        option = word.partition("=")[0]
        if option.startswith("--"):
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
            assert option in known, f"bertqa {' '.join(words)}: there is no {option}"
    left_out = any(word in ("…", "--help") or word.startswith("$") for word in arguments)
    if not (isinstance(command, TyperGroup) or left_out):
        command.make_context("bertqa", [*arguments])


def _source(module: str) -> str:
    """Text of a module; empty where it is not ours."""
    spec = find_spec(module)
    assert spec, f"there is no module {module}"
    if module.partition(".")[0] not in FOLDERS:
        return ""
    if spec.submodule_search_locations:
        return _source(f"{module}.__main__")
    text = Path(spec.origin or "").read_text(encoding="utf-8")
    commands = re.search(r"^    from ([\w.]*commands) import \w*app$", text, re.MULTILINE)  # has the options
    return _source(commands[1]) if commands else text


def _module(words: list[str]) -> None:
    """Check a call of ``python -m``."""
    name, *arguments = words
    source = _source(name)
    if name in SAME_AS:
        _parse([*SAME_AS[name].split(), *arguments])
        return
    for option in (word.partition("=")[0] for word in arguments if source and word.startswith("--")):
        field = option.strip("-").replace("-", "_")
        assert re.search(rf"{option}\b|\b{field}: ", source), f"{name} has no {option}"


def _compose(words: list[str]) -> None:
    """Check a call of ``docker compose run``: the service, and what it is given."""
    services = yaml.safe_load(_text("docker-compose.yml"))["services"]
    rest = iter(words)
    for word in rest:
        if word == "--env":
            next(rest)
        elif not word.startswith("-"):
            assert word in services, f"docker-compose.yml has no service {word}"
            if word in IN_CONTAINER:
                _parse([*IN_CONTAINER[word].split(), *rest])
            return


def _check(words: list[str]) -> None:
    program, *arguments = words
    if program == "horovodrun":
        arguments = arguments[arguments.index("python") :]
        program, *arguments = arguments
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE)
        for word in arguments:
            assert "=" in word or word in targets, f"the Makefile has no {word}"
    elif program == "bertqa":
        _parse(arguments)
    elif program in ("python", "python3") and arguments[:1] == ["-m"]:
        _module(arguments[1:])
    elif program == "docker" and arguments[0] == "compose" and "run" in arguments:
        _compose(arguments[arguments.index("run") + 1 :])
    else:
        known = program in SYSTEM or program == "." or program.startswith((".venv/bin/", "--"))
        assert known, f"{program} is not known"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTQA_API_KEYS_FILE", "keys")  # as docs/operations.md sets it
    for words in _commands(page):
        try:
            _check(words)
        except (TyperException, AssertionError) as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page: str) -> None:
    for code in re.findall(r"`((?:bertqa|make) [^`]+)`", _prose(page)):
        program, *words = shlex.split(code)
        if any(word.strip("[]…").isupper() for word in words[:1]):
            continue  # a placeholder, as in `bertqa COMMAND --help`
        if program == "make":
            _check([program, *words])
            continue
        command, arguments = _walk([word for word in words if word != "…"])
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert option in known, f"{page}: {code}: there is no {option}"
