"""Triton's model repository as files: which bundles there are, and which of them answer.

::

    model_repository/
      serving.json          for each model its `Serving`: the loaded versions, the active one, the one before
      <model>/config.pbtxt  generated from that and the manifests of its versions
      <model>/<version>/    a bundle: engine, tokenizer, manifest.json

Triton polls the directory and the service polls ``serving.json``, so a change of these files is all that it takes to
load a version, to let it answer, and to take it away. Both must be able to read at any moment: every file is replaced
in one step, and what is being written lies at the top, beside the models. (In poll mode Triton builds all versions of a
model anew when a file appears in its directory that is neither ``config.pbtxt`` nor in the directory of a version.)
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from bertqa.manifest import MANIFEST_FILE, MODEL_NAME, Bundle, BundleMismatch, Manifest, from_json, read_object
from bertqa.triton_config import MalformedConfig, ModelConfig, Serving, model_config, parse, to_text

SERVING_FILE = "serving.json"
CONFIG_FILE = "config.pbtxt"
LOCK_FILE = ".lock"
MODEL_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Names that a model may have: part of paths, of URLs, and of Triton's configuration."""


class ChangeRefused(Exception):
    """What is served cannot be changed like that; the message names the version and what to do first."""


class Repository:
    """A model repository on disk. Nothing is kept in memory: every call reads what is there now."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def versions(self, model: str) -> list[int]:
        """Published versions of a model, rising; a directory without a manifest is none."""
        found = [entry for entry in (self.root / model).glob("[1-9]*") if entry.name.isdecimal()]
        return sorted(int(entry.name) for entry in found if (entry / MANIFEST_FILE).is_file())

    def directory(self, model: str, version: int) -> Path:
        """Where the bundle lies."""
        return self.root / model / str(version)

    def manifest(self, model: str, version: int) -> Manifest:
        """Read a bundle's manifest.

        Raises:
            BundleMismatch: it is missing or broken.
        """
        return Manifest.read(self.directory(model, version) / MANIFEST_FILE)

    def serving(self) -> dict[str, Serving]:
        """How each model is served, by name; one that ``serving.json`` does not know is served at its highest version.

        Raises:
            BundleMismatch: ``serving.json`` is broken; the message names the field.
        """
        names = sorted(path.name for path in self.root.glob("*/") if MODEL_NAMES.fullmatch(path.name))
        stated = self._stated()
        found = {name: stated.get(name) or self._highest(name) for name in names}
        return {name: serving for name, serving in found.items() if serving}

    def served(self, model: str) -> Serving:
        """How one model is served.

        Raises:
            ChangeRefused: there is no such model; the message names those that there are.
            BundleMismatch: ``serving.json`` is broken.
        """
        models = self.serving()
        if model not in models:
            raise ChangeRefused(f"{model}: no such model in {self.root}; there are {', '.join(models) or 'none'}")
        return models[model]

    def open(self, model: str = MODEL_NAME, version: int | None = None) -> Bundle:
        """Open a version of a model, by default the active one.

        Raises:
            BundleMismatch: there is none, or its parts do not belong together.
        """
        if version is None:
            serving = self.serving().get(model)
            if serving is None:
                raise BundleMismatch(
                    f"{self.root / model}: holds no built version; run `python -m engine_builder --checkpoint DIR "
                    "--target cpu` to build one"
                )
            version = serving.active
        return Bundle.open(self.directory(model, version))

    def expected_config(self, model: str, serving: Serving) -> ModelConfig:
        """The configuration of a model that is served like that.

        Raises:
            InvalidArgument: its loaded versions cannot be one model.
            BundleMismatch: the manifest of a loaded version is broken; another one is no hindrance.
        """
        manifests = {}
        for version in self.versions(model):
            try:
                manifests[version] = self.manifest(model, version)
            except BundleMismatch:
                if version in serving.loaded:
                    raise
        return model_config(model, manifests, serving)

    def written_config(self, model: str) -> ModelConfig:
        """The configuration that Triton finds.

        Raises:
            OSError: there is none to be read.
            MalformedConfig: it is not one.
        """
        return parse((self.root / model / CONFIG_FILE).read_text())

    def is_configured(self, model: str) -> bool:
        """Whether the ``config.pbtxt`` on disk says what belongs to how the model is served.

        Raises:
            ChangeRefused, BundleMismatch: as in `served` and `expected_config`.
        """
        try:
            written = self.written_config(model)
        except (OSError, MalformedConfig, UnicodeDecodeError):
            return False
        return bool(written == self.expected_config(model, self.served(model)))

    def load(self, model: str, version: int) -> None:
        """Have Triton load a version beside those that are loaded.

        Raises:
            ChangeRefused: there is no such version, or it cannot be loaded beside the others.
        """
        self._change(model, lambda serving: replace(serving, loaded=tuple(sorted({*serving.loaded, version}))))

    def unload(self, model: str, version: int) -> None:
        """Have Triton drop a version; it stays on disk.

        Raises:
            ChangeRefused: it is the active one.
        """

        def change(serving: Serving) -> Serving:
            if version == serving.active:
                raise ChangeRefused(f"{model}: version {version} is the active one; switch to another first")
            return replace(serving, loaded=tuple(each for each in serving.loaded if each != version))

        self._change(model, change)

    def switch(self, model: str, version: int) -> None:
        """Let a loaded version answer; the one that did before becomes the previous one.

        Raises:
            ChangeRefused: the version is not loaded.
        """

        def change(serving: Serving) -> Serving:
            if version not in serving.loaded:
                raise ChangeRefused(
                    f"{model}: version {version} is not loaded; run `bertqa models load {model} {version}` first"
                )
            if version == serving.active:
                return serving
            return replace(serving, active=version, previous=serving.active)

        self._change(model, change)

    def activate(self, model: str, version: int, *, alone: bool = False, **options: object) -> None:
        """Load a version and let it answer, unchecked; each service goes over to it when Triton has it ready.

        Args:
            model: its name.
            version: one on disk.
            alone: load no other; only for a Triton that is not running yet.
            options: as in `configure`.
        """

        def change(serving: Serving) -> Serving:
            loaded = (version,) if alone else tuple(sorted({serving.active, version}))
            previous = serving.previous if version == serving.active else serving.active
            return _with(replace(serving, active=version, previous=previous, loaded=loaded), options)

        self._change(model, change)

    def configure(self, model: str, **options: object) -> None:
        """Set serving options, fields of `Serving`; those that are None stay as they are."""
        self._change(model, lambda serving: _with(serving, options))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer away.

        Raises:
            ChangeRefused: the repository cannot be written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / LOCK_FILE).open("w")
        except OSError as error:
            raise ChangeRefused(f"{self.root}: cannot be written to ({error.strerror})") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _change(self, model: str, change: Callable[[Serving], Serving]) -> None:
        """Change how a model is served: first what Triton reads, then what the service does."""
        with self.locked():
            serving = change(self.served(model))
            there = self.versions(model)
            if missing := [version for version in serving.loaded if version not in there]:
                listed = ", ".join(map(str, there))
                raise ChangeRefused(f"{model}: there is no version {missing[0]}, only {listed}")
            if serving.previous not in there:
                serving = replace(serving, previous=None)
            try:
                config = to_text(self.expected_config(model, serving))
            except ValueError as error:
                raise ChangeRefused(f"{model}: {error}; publish the new one under another name (--model)") from error
            stated = {name: asdict(each) for name, each in {**self._stated(), model: serving}.items()}
            self._replace(
                {
                    self.root / model / CONFIG_FILE: config,
                    self.root / SERVING_FILE: json.dumps(stated, indent=2) + "\n",
                }
            )

    def _replace(self, texts: Mapping[Path, str]) -> None:
        """Write files, each in one step, when all of them have found room on the disk.

        What holds just that already is left alone: its time of change is a signal to others.

        Raises:
            ChangeRefused: a file cannot be written; all are as they were.
        """
        written: dict[Path, Path] = {}
        for path, text in texts.items():
            if path.is_file() and path.read_text() == text:
                continue
            partial = self.root / f".{path.name}"
            written[partial] = path
            try:
                with partial.open("w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                for each in written:
                    each.unlink(missing_ok=True)
                raise ChangeRefused(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error
        for partial, path in written.items():
            partial.replace(path)

    def _stated(self) -> Mapping[str, Serving]:
        path = self.root / SERVING_FILE
        if not path.is_file():
            return {}
        stated = {}
        for name, values in read_object(path).items():
            place = f"{path}: {name:.100}"
            if not isinstance(values, dict):
                raise BundleMismatch(f"{place}: must be a JSON object")
            stated[name] = serving = from_json(Serving, values, place)
            if serving.active not in serving.loaded:
                raise BundleMismatch(f"{place}: active is {serving.active}, which is not among the loaded")
        return stated

    def _highest(self, model: str) -> Serving | None:
        versions = self.versions(model)
        return Serving(active=versions[-1], loaded=(versions[-1],)) if versions else None


def _with(serving: Serving, options: Mapping[str, object]) -> Serving:
    return replace(serving, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
