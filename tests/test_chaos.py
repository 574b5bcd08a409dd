"""The scenarios of ``make chaos``, with small numbers: nothing is lost, wrong or leaked, whatever breaks."""

from collections.abc import Iterator

import pytest
from chaos.__main__ import SCENARIOS
from chaos.faults import Scenario
from chaos.product import Product
from chaos.report import Size, table

SMALL = Size(requests=200, clients=8, rounds=1, inputs=500, soak_minutes=0.1, patience=10.0)
"""A busy machine may take longer than promised, but not for ever."""


@pytest.fixture(scope="module")
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with Product(tmp_path_factory.mktemp("chaos"), request.param).running() as running:
        yield running


@pytest.mark.parametrize(
    ("product", "scenario"),
    [pytest.param(layout, scenario, id=scenario.__name__) for layout, scenario in SCENARIOS],
    indirect=["product"],
)
def test_every_request_ends_with_the_right_answer_or_a_clear_error(product: Product, scenario: Scenario) -> None:
    row = scenario(product, SMALL)
    print(table([row]))
    assert row.is_kept, row.problems or row.leaked
    assert row.injected
    assert row.right
