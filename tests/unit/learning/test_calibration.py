"""Temperature scaling, calibration error and the figures of classes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from services.learning import calibration


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_logits_that_are_too_sure_or_too_unsure_is_found(temperature: float) -> None:
    random = np.random.default_rng(0)
    true_logits = random.normal(0, 1.5, (20000, 5))
    chances = softmax(true_logits, axis=1)
    labels = (chances.cumsum(axis=1) < random.random((len(chances), 1))).sum(axis=1)
    logits = (true_logits * temperature).astype(np.float32)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    after = calibration.expected_calibration_error(calibration.probabilities(logits, found), labels)
    before = calibration.expected_calibration_error(calibration.probabilities(logits, 1.0), labels)
    # A bin of about 1300 boxes is off by its counting error, some 0.01.
    assert after < 0.015
    assert before > 0.1 or temperature == 1.0


def test_no_box_is_certain_where_all_were_right() -> None:
    logits = np.full((18, 2), -4.0, np.float32)
    logits[np.arange(18), np.arange(18) % 2] = 4.0
    labels = np.arange(18) % 2
    chances = calibration.probabilities(logits, calibration.fit_temperature(logits, labels))
    # One doubtful in n + 2.
    assert chances.max(axis=1) == pytest.approx(np.full(18, 19 / 20), rel=1e-3)


def test_calibration_error_by_hand() -> None:
    chances = np.array([[0.95, 0.05], [0.95, 0.05], [0.3, 0.7], [0.3, 0.7]], np.float32)
    labels = np.array([0, 1, 1, 1])
    # Half right at 0.95: |0.5 - 0.95|; all right at 0.7: |1 - 0.7|; half of the boxes each.
    assert calibration.expected_calibration_error(chances, labels) == pytest.approx((0.45 + 0.3) / 2, rel=1e-5)
    certain = np.array([[1.0, 0.0]], np.float32)
    assert calibration.expected_calibration_error(certain, np.array([0])) == 0.0


def test_figures_of_classes_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    found = np.array([0, 0, 1, 1, 0, 0])
    figures = calibration.class_figures(found, labels, 3)
    assert figures.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert figures.precision == pytest.approx([2 / 4, 1 / 2, 0])
    assert figures.recall == pytest.approx([2 / 3, 1 / 2, 0])
    assert figures.f1 == pytest.approx([2 * 0.5 * (2 / 3) / (0.5 + 2 / 3), 0.5, 0])
    assert figures.accuracy == 0.5
