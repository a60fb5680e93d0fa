"""The table of metric names: complete, and never a number where there is none."""

import pytest

from potstill.metrics import METRICS, MISSING, number


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf"), "0.5", True, [1.0]])
def test_what_is_no_finite_number_is_missing(value):
    assert number({"loss": value}, "loss") is None


def test_an_absent_name_is_missing_and_zero_is_not():
    assert number({}, "loss") is None
    assert number({"loss": 0}, "loss") == 0.0


def test_every_metric_shows_a_number_a_unit_and_that_it_is_missing():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.phrase
        assert metric.show(0.5) == format(0.5, metric.format)
        assert metric.show(None) == metric.show_with_unit(None) == MISSING
        assert metric.show_with_unit(0.5).endswith(metric.unit)


def test_numbers_read_as_people_write_them():
    assert METRICS["accuracy"].show_with_unit(0.6123) == "61.2%"
    assert METRICS["tokens_per_second"].show_with_unit(5120.4) == "5,120 tokens/s"
    assert METRICS["lr"].show(2e-4) == "2.00e-04"
