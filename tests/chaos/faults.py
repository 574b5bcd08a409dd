"""Faults of the engine and of the way to it."""

import os
import signal
from collections.abc import Callable

from chaos.clients import load
from chaos.product import Layout, Product, until
from chaos.report import Row, Size

Scenario = Callable[[Product, Size], Row]


def triton_killed(product: Product, size: Size) -> Row:
    row = Row(fault="Triton: kill -9")
    (triton,) = product.tritons
    with product.watched(row, size), load(row, product.asked, product.addresses, size) as clients:
        for number in range(1, 3):
            clients.until(requests=size.requests * number // 3)
            pid = triton.pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            row.injected += 1
            until(lambda: triton.pid not in (None, pid), "Triton is not started again")  # noqa: B023
            product.ready_after(row, product.engine_answers)
        clients.until(requests=size.requests, right=row.right + size.clients)
    return row


SCENARIOS: tuple[tuple[Layout, Scenario], ...] = ((Layout(), triton_killed),)
