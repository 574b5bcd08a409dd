"""Test that a test marked `alone` gets the machine to itself, and is not overtaken forever."""

import threading
from pathlib import Path

from tests.support.machine import machine


def test_who_is_alone_waits_for_the_others_and_they_wait_for_it(tmp_path: Path) -> None:
    inside: list[str] = []
    events = {name: threading.Event() for name in ("first", "alone", "late")}

    def hold(name: str, *, alone: bool) -> None:
        with machine(tmp_path, alone=alone):
            inside.append(name)
            assert events[name].wait(30)
            inside.append(f"{name} ends")

    def start(name: str, *, alone: bool = False) -> threading.Thread:
        thread = threading.Thread(target=hold, args=(name,), kwargs={"alone": alone})
        thread.start()
        thread.join(0.3)  # time to come in, if it may
        return thread

    threads = [start("first"), start("alone", alone=True), start("late")]
    assert inside == ["first"], "who came after the one that wants to be alone does not overtake it"
    for event in events.values():
        event.set()
    for thread in threads:
        thread.join(30)
    assert inside == ["first", "first ends", "alone", "alone ends", "late", "late ends"]


def test_others_share_it(tmp_path: Path) -> None:
    with machine(tmp_path, alone=False), machine(tmp_path, alone=False):
        pass
