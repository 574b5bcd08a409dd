"""Manage Triton's model repository on disk: which bundles exist, and which version of each model is active.

::

    model_repository/
      serving.json          the `Serving` of each model: loaded versions, the active one, the previous one
      <model>/config.pbtxt  generated from serving.json and the manifests of the versions
      <model>/<version>/    a bundle: engine, tokenizer, manifest.json

Triton polls the directory and the service polls ``serving.json``, so changing these files is enough to load, activate
or unload a version. Both may read at any moment, so every file is replaced atomically, and temporary files are at the
top level, next to the models. (In poll mode, any file in a model's directory other than ``config.pbtxt`` and the
version directories makes Triton reload all versions of that model.)
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
"""Valid model names; they are part of paths, URLs and Triton's configuration."""


class ChangeRefused(Exception):
    """The requested change is not possible; the message names the version and what to do first."""


class Repository:
    """A model repository on disk. It caches nothing: every call reads the current files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def versions(self, model: str) -> list[int]:
        """Return the published versions of a model in ascending order; directories without a manifest do not count."""
        found = [entry for entry in (self.root / model).glob("[1-9]*") if entry.name.isdecimal()]
        return sorted(int(entry.name) for entry in found if (entry / MANIFEST_FILE).is_file())

    def directory(self, model: str, version: int) -> Path:
        """Return the directory of a bundle."""
        return self.root / model / str(version)

    def manifest(self, model: str, version: int) -> Manifest:
        """Read a bundle's manifest.

        Raises:
            BundleMismatch: the manifest is missing or invalid.
        """
        return Manifest.read(self.directory(model, version) / MANIFEST_FILE)

    def serving(self) -> dict[str, Serving]:
        """Return the `Serving` of each model by name; a model not in ``serving.json`` serves its highest version.

        Raises:
            BundleMismatch: ``serving.json`` is invalid; the message names the field.
        """
        names = sorted(path.name for path in self.root.glob("*/") if MODEL_NAMES.fullmatch(path.name))
        stated = self._stated()
        found = {name: stated.get(name) or self._highest(name) for name in names}
        return {name: serving for name, serving in found.items() if serving}

    def served(self, model: str) -> Serving:
        """Return how one model is served.

        Raises:
            ChangeRefused: there is no such model; the message lists the existing ones.
            BundleMismatch: ``serving.json`` is invalid.
        """
        models = self.serving()
        if model not in models:
            raise ChangeRefused(f"{model}: no such model in {self.root}; found: {', '.join(models) or 'none'}")
        return models[model]

    def open(self, model: str = MODEL_NAME, version: int | None = None) -> Bundle:
        """Open a version of a model, by default the active one.

        Raises:
            BundleMismatch: there is no such version, or its parts do not match.
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
        """Generate the configuration of a model for a `Serving`.

        Raises:
            InvalidArgument: the loaded versions cannot be served as one model.
            BundleMismatch: the manifest of a loaded version is invalid; those of other versions do not matter.
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
        """Read the ``config.pbtxt`` on disk.

        Raises:
            OSError: the file cannot be read.
            MalformedConfig: the file is not a model configuration.
        """
        return parse((self.root / model / CONFIG_FILE).read_text())

    def is_configured(self, model: str) -> bool:
        """Check whether the ``config.pbtxt`` on disk is the one expected for how the model is served.

        Raises:
            ChangeRefused, BundleMismatch: as in `served` and `expected_config`.
        """
        try:
            written = self.written_config(model)
        except (OSError, MalformedConfig, UnicodeDecodeError):
            return False
        return bool(written == self.expected_config(model, self.served(model)))

    def load(self, model: str, version: int) -> None:
        """Have Triton load a version in addition to those already loaded.

        Raises:
            ChangeRefused: there is no such version, or it cannot be loaded together with the others.
        """
        self._change(model, lambda serving: replace(serving, loaded=tuple(sorted({*serving.loaded, version}))))

    def unload(self, model: str, version: int) -> None:
        """Have Triton unload a version; it stays on disk.

        Raises:
            ChangeRefused: the version is active.
        """

        def change(serving: Serving) -> Serving:
            if version == serving.active:
                raise ChangeRefused(f"{model}: version {version} is active; switch to another version first")
            return replace(serving, loaded=tuple(each for each in serving.loaded if each != version))

        self._change(model, change)

    def switch(self, model: str, version: int) -> None:
        """Make a loaded version active; the version active until now becomes the previous one.

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
        """Load a version and make it active, without checking it; services switch once Triton has it ready.

        Args:
            model: name of the model.
            version: a version on disk.
            alone: load no other version; only for a Triton that is not running yet.
            options: as in `configure`.
        """

        def change(serving: Serving) -> Serving:
            loaded = (version,) if alone else tuple(sorted({serving.active, version}))
            previous = serving.previous if version == serving.active else serving.active
            return _with(replace(serving, active=version, previous=previous, loaded=loaded), options)

        self._change(model, change)

    def configure(self, model: str, **options: object) -> None:
        """Set serving options (fields of `Serving`); options that are None keep their value."""
        self._change(model, lambda serving: _with(serving, options))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the repository's write lock.

        Raises:
            ChangeRefused: the repository is not writable.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / LOCK_FILE).open("w")
        except OSError as error:
            raise ChangeRefused(f"{self.root}: not writable ({error.strerror})") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _change(self, model: str, change: Callable[[Serving], Serving]) -> None:
        """Change how a model is served: write the file that Triton reads first, then the one that the service reads."""
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
        """Write all new contents to temporary files, then replace each file atomically.

        Files that already have the new content are not touched, because others watch their modification time.

        Raises:
            ChangeRefused: a file cannot be written; none was changed.
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
                raise BundleMismatch(f"{place}: active is {serving.active}, which is not one of the loaded versions")
        return stated

    def _highest(self, model: str) -> Serving | None:
        versions = self.versions(model)
        return Serving(active=versions[-1], loaded=(versions[-1],)) if versions else None


def _with(serving: Serving, options: Mapping[str, object]) -> Serving:
    return replace(serving, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
