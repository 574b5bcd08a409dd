"""Kill, stop and replace replicas behind the load balancer."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.runtime.processes import living_children
from tests.chaos.clients import load
from tests.chaos.faults import Scenario
from tests.chaos.product import PATIENT, Layout, Product, Service, ask
from tests.chaos.report import Row, Size
from tests.support.waiting import until

SHUTDOWN_DELAY_S = 3
"""HAProxy's checks take at most 2.5 s to notice."""
BALANCED = Layout(tritons=2, balanced=True, settings=(("shutdown_delay_s", SHUTDOWN_DELAY_S), *PATIENT))


def _none_refused(row: Row) -> Row:
    if row.refused:
        row.problems.append(f"refused although another replica was available: {row.refusal}")
    return row


def replica_killed(product: Product, size: Size) -> Row:
    """Kill only the service process, which its launcher restarts; then all its processes, as when a container dies."""
    row = Row(fault="service replica killed (-9)")
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        kills = [(service, alone) for alone in (True, False) for service in product.services]
        if size.rounds == 1:
            kills = [kills[0], kills[-1]]  # each kind once, on each replica once
        for number, (service, alone) in enumerate(kills, 1):
            clients.until(requests=size.requests * number // (len(kills) + 1))
            worker = service.worker
            if alone:
                os.kill(worker, signal.SIGKILL)
                until(lambda: living_children(service.process.pid) - {worker}, "not started again")  # noqa: B023
            else:
                for process in (service.process.pid, worker):
                    os.kill(process, signal.SIGKILL)
                service.process.wait(60)
                service.start()
            row.injected += 1
            until(product.is_ready, f"not ready again; see {service.log}")
        clients.until(requests=size.requests, right=row.right + size.clients)
    return _none_refused(row)


@contextmanager
def _watching(service: Service, seen: list[tuple[int, int]]) -> Iterator[None]:
    """Record repeatedly what a new connection gets: the readiness status and the status of a question."""
    done = threading.Event()

    def watch() -> None:
        question = {"question": "Who wrote it?", "context": "Ada Lovelace wrote the first program in London."}
        while not done.wait(0.05):
            ready = ask(*service.address, "/health/ready")[0]
            seen.append((ready, ask(*service.address, "/v1/answer", question)[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def graceful_stop(product: Product, size: Size) -> Row:
    """Check that readiness fails first, while everything is still answered, and that accepted requests finish."""
    row = Row(fault="SIGTERM to a replica under load, engine slow")
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number, service in enumerate(product.services, 1):
            clients.until(requests=size.requests * number // 3)
            seen: list[tuple[int, int]] = []
            with product.faults.on("slow", share=0.3, seconds=0.1), _watching(service, seen):
                time.sleep(0.5)
                code = service.stop()
            row.injected += 1
            statuses = [ready for ready, _ in seen]
            answered = [asked for ready, asked in seen if ready == 503]
            order = list(dict.fromkeys(statuses))
            if code or order != [200, 503, 0] or len(answered) < 5 or set(answered[:-1]) != {200}:
                row.problems.append(f"exit code {code}; readiness {order}; questions meanwhile {answered}")
            service.start()
            until(product.is_ready, f"not ready again; see {service.log}")
        clients.until(requests=size.requests, right=row.right + size.clients)
    return _none_refused(row)


def rolling_restart(product: Product, size: Size) -> Row:
    row = Row(fault="rolling restart: every replica, then every Triton")
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number, service in enumerate(product.services, 1):
            clients.until(requests=size.requests * number // 5)
            service.stop()
            service.start()
            row.injected += 1
            until(product.is_ready, f"not ready again; see {service.log}")
        for number in range(len(product.tritons)):
            clients.until(requests=size.requests * (number + 3) // 5)
            product.restart_triton(number)
            row.injected += 1
            product.ready_after(row, product.engine_answers)
            until(product.circuits_are_closed, "a restarted Triton is not used again")
        clients.until(requests=size.requests, right=row.right + size.clients)
    return _none_refused(row)


def one_of_two_tritons_dies(product: Product, size: Size) -> Row:
    row = Row(fault="one of two Tritons killed, then stopped (SIGSTOP)")
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number, triton in enumerate(product.tritons, 1):
            clients.until(requests=size.requests * number // 3)
            pid = triton.pid
            assert pid
            if number == 1:
                os.kill(pid, signal.SIGKILL)
                until(lambda: triton.pid not in (None, pid), "Triton is not started again")  # noqa: B023
            else:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(6)
                os.kill(pid, signal.SIGCONT)
            row.injected += 1
            product.ready_after(row, product.engine_answers)
        clients.until(requests=size.requests, right=row.right + size.clients)
    return row


SCENARIOS: tuple[tuple[Layout, Scenario], ...] = (
    (BALANCED, replica_killed),
    (BALANCED, one_of_two_tritons_dies),
    (BALANCED, graceful_stop),
    (BALANCED, rolling_restart),
)
