"""Whether an adversarial training went wrong, by its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LEAST_DEVIATION = 0.1
"""Of what the denoiser makes of subvolumes; density maps have 1."""
LARGEST_LEAD = 0.9
"""Of how real a discriminator finds what is real over what is made: with more it tells them without fail."""
EPOCHS = 3
"""So many epochs in a row make a warning."""


def warnings_of(epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """What is wrong at the end of DUAL's epochs so far, each with the means of its loss's values; nothing in most
    trainings.
    """
    found = []
    last = epochs[-EPOCHS:]
    if epochs and epochs[-1]["deviation"] < LEAST_DEVIATION:
        found.append(
            f"the denoiser makes nearly the same of everything: standard deviation {epochs[-1]['deviation']:.2g} in "
            f"epoch {len(epochs)}, 1 is that of the second domain; train with another seed or a lower learning_rate"
        )
    for domain, name in (("tomograms", "tomograms"), ("densities", "density maps")):
        if len(last) == EPOCHS and all(row[f"real_{domain}"] - row[f"made_{domain}"] > LARGEST_LEAD for row in last):
            found.append(
                f"the discriminator of {name} has told all that is made from what is real for {EPOCHS} epochs, up to "
                f"epoch {len(epochs)}: the others learn nothing from it any more; a lower learning_rate or "
                "adversarial_weight, or more and more varied data, may help"
            )
    return found
