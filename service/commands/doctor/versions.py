"""Check that a model version has not changed since it was published."""

import json

from bertqa.manifest import QUESTIONS_FILE, Bundle, BundleMismatch, changed_files, rebuild
from bertqa.repository import Repository
from bertqa.triton_config import Serving
from service.commands.doctor.finding import Finding, Level


def check_version(repository: Repository, model: str, version: int, serving: Serving) -> tuple[Finding, Bundle | None]:
    """Open a version and hash its files; also returns the version if it is intact.

    A problem with a version that is not loaded has no effect yet, so it is a warning.
    """
    subject = f"bundle {model} {version}"
    bad: Level = "FAIL" if version in serving.loaded else "WARN"
    directory = repository.directory(model, version)
    try:
        bundle = repository.open(model, version)
        json.loads((directory / QUESTIONS_FILE).read_bytes())
    except (BundleMismatch, OSError, ValueError) as error:
        return Finding(bad, subject, str(error)), None
    manifest = bundle.manifest
    if changed := changed_files(directory, manifest):
        fix = rebuild(manifest.target)
        if version == serving.active and serving.previous:
            fix += f", or `bertqa models rollback {model}`"
        return Finding(bad, subject, f"{changed[0]} has changed since it was published", fix), None
    role = "active" if version == serving.active else "loaded" if version in serving.loaded else "not loaded"
    text = f"{role}, {manifest.identity}, {len(manifest.files)} files unchanged since publication"
    return Finding("ok", subject, text), bundle
