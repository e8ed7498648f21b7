"""The learning rate's course."""

import pytest

from trainer.schedule import lr_factor


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    factors = [lr_factor(index, 100, 0.1) for index in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.2
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert lr_factor(0, 1, 0.06) > 0


def test_a_line_and_a_constant() -> None:
    assert [lr_factor(index, 4, 0.0, "linear", 0.0) for index in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert {lr_factor(index, 4, 0.0, "constant", 0.0) for index in range(4)} == {1.0}
