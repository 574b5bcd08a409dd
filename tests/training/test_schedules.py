"""Test the learning rate schedules, and the scaling of the rate with the batch."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.schedules import ScalingRule, linear, poly, scaled_learning_rate


def test_linear_rises_over_the_warm_up_and_falls_to_zero_after_the_last_step() -> None:
    rates = [linear(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 101)])
    assert rates[100] == 0


def test_poly_drops_by_15_percent_at_the_end_of_nvidias_phase_1_warm_up() -> None:
    steps, warmup = 7038, 0.2843
    rising = 2001
    assert poly(rising - 1, steps, warmup) == 1.0
    assert poly(rising, steps, warmup) == pytest.approx(0.846, abs=5e-4)
    assert poly(rising - 2, steps, warmup) == pytest.approx(2000 / 2001)
    assert poly(steps - 1, steps, warmup) == pytest.approx((1 / steps) ** 0.5)
    assert poly(steps, steps, warmup) == 0


def test_poly_agrees_with_nvidias_two_counts_up_to_one_step() -> None:
    def nvidia(count: int) -> float:
        progress = count / 1563
        return progress / 0.128 if progress < 0.128 else (1 - progress) ** 0.5

    for step in range(1563):
        assert min(abs(poly(step, 1563, 0.128) - nvidia(count)) for count in (step, step + 1)) < 1e-3


@settings(deadline=None)
@given(steps=st.integers(1, 3000), warmup=st.floats(0, 0.99), schedule=st.sampled_from([linear, poly]))
def test_every_step_has_a_rate_that_rises_to_the_peak_and_then_falls(
    steps: int, warmup: float, schedule: Callable[[int, int, float], float]
) -> None:
    rates = [schedule(step, steps, warmup) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = max(round(warmup * steps), 1) - 1
    assert rates[peak] == 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_square_root_rule_gives_the_rates_of_the_lamb_paper() -> None:
    # You et al. 2019, their untuned rates: 5 / (2^x 10^3) with x = 3.0, 2.5 … 0 for batches of 512, 1024 … 32768.
    for doublings in range(7):
        expected = 5 / (2 ** (3 - doublings / 2) * 1e3)
        assert scaled_learning_rate(5e-3, 32768, 512 * 2**doublings) == pytest.approx(expected)


@settings(deadline=None)
@given(base=st.floats(1e-6, 1), batches=st.tuples(*[st.integers(1, 2**17)] * 3))
@pytest.mark.parametrize(("rule", "for_twice_the_batch"), [("sqrt", 2**0.5), ("linear", 2)])
def test_a_rate_scaled_twice_is_the_rate_scaled_once(
    rule: ScalingRule, for_twice_the_batch: float, base: float, batches: tuple[int, int, int]
) -> None:
    first, second, third = batches
    twice = scaled_learning_rate(scaled_learning_rate(base, first, second, rule), second, third, rule)
    assert twice == pytest.approx(scaled_learning_rate(base, first, third, rule))
    assert scaled_learning_rate(base, first, 2 * first, rule) == pytest.approx(base * for_twice_the_batch)


def test_an_empty_batch_has_no_rate() -> None:
    with pytest.raises(ValueError, match="at least one sequence, not 0"):
        scaled_learning_rate(1e-3, 256, 0)
