"""What rates say after known steps."""

import pytest

from scheduler.rates import DecodeCurve, GroupRates
from scheduler.simulation.step_time import GPT_OSS_120B_H200, StepShape


def decode_step_s(num_sequences: int) -> float:
    return GPT_OSS_120B_H200(StepShape(0, num_sequences, 1024 * num_sequences))


def test_nothing_is_claimed_before_the_first_step() -> None:
    rates = GroupRates()
    assert rates.prefill_tokens_per_s == rates.prefill_s(100, 8192) == rates.decode.at(8) == rates.last_decode_step_s == 0.0


def test_one_size_of_chunk_gives_a_rate_and_two_give_the_cost_of_a_step_too() -> None:
    rates = GroupRates()
    rates.learn_step(1000, 0, 0.06)
    assert rates.prefill_tokens_per_s == pytest.approx(1000 / 0.06) and rates.prefill_s(500, 8192) == pytest.approx(0.03)
    rates.learn_step(2000, 0, 0.11)
    assert rates.prefill_s(3000, 8192) == pytest.approx(0.16), "50 us a token and 10 ms a step"
    assert rates.prefill_s(3000, 1000) == pytest.approx(0.18), "three steps"


def test_the_curve_follows_the_roofline_between_and_beyond_what_was_measured() -> None:
    curve = DecodeCurve()
    for size in (1, 4, 16, 32, 64, 96, 128):
        for _ in range(20):
            curve.add(size, decode_step_s(size))
    for size in (2, 8, 24, 48, 80, 112):
        assert curve.at(size) == pytest.approx(decode_step_s(size), rel=0.15)
    steps = [curve.at(size + 1) - curve.at(size) for size in (1, 20, 60, 100)]
    assert steps == sorted(steps, reverse=True) and steps[-1] >= 0, "concave: one more costs less the more there are"
    assert curve.at(256) > curve.at(128)


def test_a_curve_never_falls_where_noise_says_so() -> None:
    curve = DecodeCurve()
    curve.add(8, 0.011)
    curve.add(64, 0.010)
    assert curve.at(8) <= curve.at(32) <= curve.at(64)


def test_old_steps_are_forgotten() -> None:
    rates = GroupRates()
    for _ in range(20):
        rates.learn_step(1000, 0, 1.0)
    for _ in range(700):
        rates.learn_step(1000, 0, 0.1)
    assert rates.prefill_tokens_per_s == pytest.approx(10_000, rel=0.01)
