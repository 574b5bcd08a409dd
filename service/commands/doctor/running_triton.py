"""Check that each running Triton has loaded the right versions and answers correctly."""

import asyncio
import json
from collections.abc import Iterator, Sequence

from bertqa.manifest import QUESTIONS_FILE, Bundle
from bertqa.repository import Repository
from service.commands.doctor.finding import Finding
from service.commands.doctor.triton_installation import check_triton_version
from service.commands.rollout import RolloutFailed, ask, tls_of
from service.runtime.ports import LOOPBACK
from service.settings import Settings
from service.triton.servers import Servers, ServerUnreachable


def check_running_triton(
    urls: Sequence[str], settings: Settings, repository: Repository, loaded: Sequence[Bundle]
) -> Iterator[Finding]:
    """Compare versions and states, and ask every server the questions recorded for each version."""
    manifests = {f"{each.model} {each.version}": each.manifest for each in loaded}
    try:
        running = Servers([url.strip() for url in urls], tls_of(settings))
    except (RolloutFailed, ServerUnreachable) as error:
        yield Finding("FAIL", "Triton", str(error))
        return
    try:
        for url, version in running.versions().items():
            yield check_triton_version(f"Triton at {url}", version, "running", manifests)
        states = running.all_states()
        for bundle in loaded:
            questions = json.loads((repository.directory(bundle.model, bundle.version) / QUESTIONS_FILE).read_bytes())
            for url in running.urls:
                subject = f"{bundle.model} {bundle.version} in Triton at {url}"
                state = states[url].get((bundle.model, bundle.version))
                if state is None or state.name != "READY":
                    text = f"is {state.name.lower()}, {state.reason or 'no reason given'}" if state else "is not known"
                    yield Finding("FAIL", subject, text, f"make it poll {repository.root}, and see its log")
                    continue
                seconds = asyncio.run(ask(running, url, bundle, questions))
                yield Finding("ok", subject, f"answers {len(seconds)} questions as at build time")
    except (RolloutFailed, ServerUnreachable) as error:
        yield Finding("FAIL", "Triton", str(error))
    finally:
        running.close()


def is_triton_at(grpc_port: int) -> bool:
    """Return whether a Triton answers at a port of this machine."""
    servers = Servers([f"{LOOPBACK}:{grpc_port}"])
    try:
        return bool(servers.versions())
    except ServerUnreachable:
        return False
    finally:
        servers.close()
