"""The same peaks as pyTME's FLC score on the same volume, template, mask and rotations."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.numerics.fourier import gaussian
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import rotation_grid
from services.picking import template_matching as matching
from services.picking.score_peaks import peaks
from services.picking.template import Template, sphere

SHAPE = (48, 56, 60)
PLACES = [(16, 18, 20), (42, 20, 26), (28, 40, 24)]


@pytest.mark.filterwarnings("ignore")
def test_the_same_peaks_as_pytme() -> None:
    from tme.analyzer import MaxScoreOverRotations
    from tme.matching_data import MatchingData
    from tme.matching_exhaustive import MATCHING_EXHAUSTIVE_REGISTER, match_exhaustive

    rng = np.random.default_rng(0)
    density = gaussian(rng.standard_normal((13, 13, 13)).astype(np.float32), 1.2) * sphere(13, 5)
    density /= density.std()
    mask = sphere(13, 5)
    rotations = rotation_grid(60)[:24]
    volume = rng.standard_normal(SHAPE).astype(np.float32)
    for number, (x, y, z) in enumerate(PLACES):
        turned = transform_volume(density, rotations[5 * number + 3])
        volume[z - 6 : z + 7, y - 6 : y + 7, x - 6 : x + 7] += turned
    # it turns by the inverse of matrices in the order of the array's axes
    matrices = np.ascontiguousarray(np.transpose(rotations.as_matrix()[:, ::-1, ::-1], (0, 2, 1)), np.float32)
    data = MatchingData(target=volume.copy(), template=density.copy(), template_mask=mask.copy(), rotations=matrices)
    setup, score = MATCHING_EXHAUSTIVE_REGISTER["FLC"]
    theirs = match_exhaustive(
        data, matching_score=score, matching_setup=setup, callback_class=MaxScoreOverRotations, job_schedule=(1, 1)
    )[0]
    tomogram = matching.Tomogram(lambda a, b: volume[a:b], SHAPE, *matching.survey(lambda a, b: volume[a:b], SHAPE))
    plan = matching.layout(SHAPE, 13, disturbed=False, mask_turns=False, variants=1)
    ours = np.zeros(SHAPE, np.float32)
    template = Template(density, mask)
    for match in matching.search(tomogram, [template], rotations, plan, matching.pieces(plan, len(rotations))):
        ours[tuple(slice(a, b) for a, b in zip(match.tile.start, match.tile.stop, strict=True))] = match.scores[0]
    found = [peaks(lambda a, b, m=m: m[a:b], SHAPE, 6.0) for m in (ours, theirs)]  # type: ignore[misc]
    best = [{tuple(place) for place in one.positions[:3].tolist()} for one in found]
    assert best[0] == best[1] == set(PLACES)
    # both interpolate the template, in different ways
    assert found[0].heights[:3] == pytest.approx(found[1].heights[:3], abs=0.02)
    inner = (slice(8, -8),) * 3
    assert np.corrcoef(ours[inner].ravel(), theirs[inner].ravel())[0, 1] > 0.95
