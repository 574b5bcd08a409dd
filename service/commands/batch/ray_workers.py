"""Run the worker processes of a batch job on Ray Data; the only module that imports Ray."""

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.data

from service.commands.batch.errors import BatchRefused
from service.commands.batch.parts import Part, Receipt
from service.commands.batch.worker import PartAnswerer

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100_000_000  # Ray holds only the names and receipts of parts


def answered(parts: Collection[Part], answerer: tuple[Any, ...], *, workers: int, address: str) -> Iterator[Receipt]:
    """Let worker processes answer parts; yields each receipt as soon as it arrives, in any order.

    Ray restarts a worker that dies, and with it the part.

    Args:
        parts: at least one.
        answerer: arguments of `PartAnswerer`.
        workers: number of processes.
        address: of a Ray cluster; ``local`` starts one on this machine that ends with this process.

    Raises:
        BatchRefused: there is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    own: dict[str, Any] = (
        {}
        if address != "local"
        else {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": _LOOPBACK,
        }
    )
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BatchRefused(f"--ray-address {address}: {error}") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        receipts = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
            PartAnswerer,  # type: ignore[arg-type]  # Ray makes the instances
            fn_constructor_args=answerer,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        for receipt in receipts.iter_rows():
            yield Receipt(**receipt)
    finally:
        ray.shutdown()
