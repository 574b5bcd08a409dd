"""Run the scenarios of ``make chaos`` with small numbers: nothing is lost, wrong or leaked."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.chaos.__main__ import SCENARIOS
from tests.chaos.faults import Scenario
from tests.chaos.product import Layout, Product
from tests.chaos.report import Size, table

pytestmark = [pytest.mark.triton, pytest.mark.slow]

SMALL = Size(requests=200, clients=8, rounds=1, inputs=500, soak_minutes=0.1, patience=10.0)
"""A busy machine may take longer than promised, but not for ever."""

LAYOUTS = list(dict.fromkeys(layout for layout, _ in SCENARIOS))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Layout], Product]]:
    """Gives the product in a layout: the one that runs, if it has that, for a start takes longer than a scenario."""
    started: dict[Layout, Product] = {}
    with ExitStack() as stack:

        def product(layout: Layout) -> Product:
            if layout not in started:
                stack.close()
                started.clear()
                started[layout] = stack.enter_context(Product(tmp_path_factory.mktemp("chaos"), layout).running())
            return started[layout]

        yield product


@pytest.mark.parametrize(
    ("layout", "scenario"),
    [
        pytest.param(layout, scenario, id=scenario.__name__)
        for layout, scenario in sorted(SCENARIOS, key=lambda pair: LAYOUTS.index(pair[0]))
    ],
)
def test_every_request_ends_with_the_right_answer_or_a_clear_error(
    running: Callable[[Layout], Product], layout: Layout, scenario: Scenario
) -> None:
    row = scenario(running(layout), SMALL)
    print(table([row]))
    assert row.is_kept, row.problems or row.leaked
    assert row.injected
    assert row.right
