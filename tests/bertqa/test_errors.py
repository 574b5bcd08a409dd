"""Where a value that is not acceptable was given: kept as a tuple, written once."""

import pickle

import pytest

from bertqa.errors import InvalidArgument, Location, render


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ((), "body"),
        (("top_k",), "top_k"),
        (("questions", 2, "top_k"), "questions[2].top_k"),
        (("questions", 0, "contexts", 31), "questions[0].contexts[31]"),
        ((0,), "[0]"),
        (("",), '""'),
        (("inputs", ""), 'inputs.""'),
        (("x" * 100, "y"), "x" * 60 + ".y"),
    ],
)
def test_a_location_is_written_as_a_client_would(location: Location, text: str) -> None:
    assert render(location) == text
    assert str(InvalidArgument(location, "must be: odd")) == f"{text}: must be: odd"


def test_a_location_moves_with_the_object_that_holds_the_value() -> None:
    error = InvalidArgument(("contexts", 3), "must contain more than white space")
    moved = error.within("questions", 2)
    assert (moved.location, moved.reason) == (("questions", 2, "contexts", 3), error.reason)
    assert error.location == ("contexts", 3)  # waiters that share an error each name their own place
    assert moved.at("context").location == ("context",)
    assert isinstance(error, ValueError)  # for callers that only want to know that it was their argument


def test_it_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidArgument(("top_k",), "must be at least 1; got 0")))
    assert (error.location, str(error)) == (("top_k",), "top_k: must be at least 1; got 0")
