from __future__ import annotations

from services.learning.collapse import warnings_of


def epoch(deviation: float = 0.9, real: float = 0.6, made: float = 0.4) -> dict[str, float]:
    return {
        "deviation": deviation,
        "real_tomograms": 0.5,
        "made_tomograms": 0.5,
        "real_densities": real,
        "made_densities": made,
    }


def test_a_sound_training_has_no_warning() -> None:
    assert warnings_of([]) == []
    assert warnings_of([epoch()] * 5) == []
    # It recovered.
    assert warnings_of([epoch(deviation=0.01, real=1.0, made=0.0)] * 4 + [epoch()]) == []
    # Two epochs are not three.
    assert warnings_of([epoch(), epoch(real=0.99, made=0.01), epoch(real=0.99, made=0.01)]) == []


def test_a_denoiser_that_makes_a_constant_is_named() -> None:
    (found,) = warnings_of([epoch(), epoch(deviation=0.02)])
    assert "standard deviation 0.02 in epoch 2" in found


def test_a_discriminator_that_always_wins_is_named() -> None:
    (found,) = warnings_of([epoch()] + [epoch(real=0.99, made=0.01)] * 3)
    assert "discriminator of density maps" in found
    assert "up to epoch 4" in found
