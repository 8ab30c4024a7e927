"""Particle tilt images of RELION 5 and Warp: geometry by hand, a real set, and sets that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.relion_tilt_images import TiltImageParticle, read_tilt_images

PARTICLES = """
data_general

_rlnTomoSubTomosAre2DStacks 1

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
_rlnImageSize #3
_rlnImageDimensionality #4
_rlnCtfDataAreCtfPremultiplied #5
1 4.0 16 2 1

data_particles

loop_
_rlnTomoName #1
_rlnTomoParticleName #2
_rlnImageName #3
_rlnOpticsGroup #4
_rlnCenteredCoordinateXAngst #5
_rlnCenteredCoordinateYAngst #6
_rlnCenteredCoordinateZAngst #7
_rlnAngleRot #8
_rlnAngleTilt #9
_rlnAnglePsi #10
_rlnTomoSubtomogramRot #11
_rlnTomoSubtomogramTilt #12
_rlnTomoSubtomogramPsi #13
_rlnOriginXAngst #14
_rlnOriginYAngst #15
_rlnOriginZAngst #16
_rlnRandomSubset #17
_rlnTomoVisibleFrames #18
TS TS/1 1_stack2d.mrcs 1 100 200 -300 10 20 30 90 0 0 8 0 4 2 [1,0,1]
TS TS/2 2_stack2d.mrcs 1 0 0 0 0 0 0 0 0 0 0 0 0 1 [1,1,1]
"""

TOMOGRAMS = """
data_global

loop_
_rlnTomoName #1
_rlnTomoTiltSeriesStarFile #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnTomoHand #6
_rlnTomoTiltSeriesPixelSize #7
TS tilts/TS.star 200 2.0 0.1 -1 1.35
"""

TILTS = b"""
data_TS

loop_
_rlnTomoXTilt #1
_rlnTomoYTilt #2
_rlnTomoZRot #3
_rlnDefocusU #4
_rlnDefocusV #5
_rlnDefocusAngle #6
_rlnMicrographPreExposure #7
0 -60 85 30000 32000 10 0
0 0 85 30000 30000 0 3
2 30 85 33000 32000 10 6
"""


def read(particles: str = PARTICLES, tomograms: str = TOMOGRAMS, tilts: bytes = TILTS) -> tuple[TiltImageParticle, ...]:
    files = {"tilts/TS.star": tilts}
    return read_tilt_images(particles.encode(), tomograms.encode(), read_file=files.__getitem__)


def test_geometry_of_relion5() -> None:
    first, second = read()
    assert (first.name, first.stack, first.half, first.box, first.pixel_size_angstrom) == (
        "TS/1",
        "1_stack2d.mrcs",
        2,
        16,
        4.0,
    )
    assert first.premultiplied
    expected = [
        Rotation.from_euler("z", 85, degrees=True)
        * Rotation.from_euler("y", tilt, degrees=True)
        * Rotation.from_euler("x", roll, degrees=True)
        for roll, tilt in ((0, -60), (2, 30))
    ]
    np.testing.assert_allclose(first.projections, [rotation.as_matrix() for rotation in expected], atol=1e-12)
    # (Rz(90))^-1 (Rz(10) Ry(20) Rz(30))^-1: the subtomogram's rotation comes last
    particle = Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).inv()
    quarter = Rotation.from_euler("z", -90, degrees=True)
    assert first.rotation is not None
    assert (first.rotation.inv() * quarter * particle).magnitude() < 1e-12
    # coordinate - R_subtomogram origin; Rz(-90) takes (8, 0, 4) to (0, -8, 4)
    np.testing.assert_allclose(first.shift_angstrom, [0, 8, -4], atol=1e-9)
    np.testing.assert_allclose(first.position_angstrom, [100, 200, -300])
    # the signal's fraction is the tilt's cosine where it is not stated
    np.testing.assert_allclose(first.scales, [0.5, np.cos(np.radians(30)) * np.cos(np.radians(2))])
    np.testing.assert_allclose(first.doses, [0, 6])
    assert second.half == 1
    assert len(second.ctfs) == 3


def test_ctf_at_the_particles_depth() -> None:
    first, second = read()
    mean = [ctf.defocus_um for ctf in second.ctfs]
    np.testing.assert_allclose(mean, [3.1, 3.0, 3.25])
    # U less than V: the axis of the greater is 90 degrees on
    assert second.ctfs[0].astigmatism_um == pytest.approx(0.2)
    assert second.ctfs[0].astigmatism_angle_degrees == pytest.approx(100)
    assert second.ctfs[2].astigmatism_angle_degrees == pytest.approx(10)
    assert second.ctfs[0].voltage_kv == 200
    assert second.ctfs[0].amplitude_contrast == 0.1
    # depth at -60 degrees: z' = -x sin + z cos = 100 sin 60 + -304 cos 60; the hand is -1
    depth = 100 * np.sin(np.radians(60)) - 304 * 0.5
    assert first.ctfs[0].defocus_um == pytest.approx(3.1 - depth * 1e-4)


def test_stacks_hold_all_tilts_or_the_visible_ones() -> None:
    first, _ = read()
    images = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, 16, 16), np.float32)
    np.testing.assert_array_equal(first.images(images)[:, 0, 0], [0, 2])
    np.testing.assert_array_equal(first.images(images[:2])[:, 0, 0], [0, 1])
    for shape in ((4, 16, 16), (3, 16, 15), (16, 16)):
        with pytest.raises(InvalidArgument, match=r"1_stack2d\.mrcs: the stack of particle TS/1 has shape"):
            first.images(np.zeros(shape, np.float32))


def test_a_real_set_of_warp(shared_data: Path) -> None:
    folder = shared_data / "real" / "ribosome_70s"
    data = (folder / "particles.star").read_bytes(), (folder / "tomograms.star").read_bytes()
    particles = read_tilt_images(*data)
    assert len(particles) == 20
    assert {particle.geometry.name for particle in particles} == {"Unt_050.tomostar", "Unt_076.tomostar"}
    assert [int(particle.visible.sum()) for particle in particles] == [37] * 10 + [35] * 10
    for particle in particles:
        assert particle.premultiplied
        assert particle.box == 32
        assert particle.pixel_size_angstrom == 12.0
        # Warp's coordinates are in pixels of 12 Å: all particles lie within the tomogram
        size = particle.geometry.size
        assert size is not None
        assert [*size] == [4400, 6000, 1400]
        assert (np.abs(particle.position_angstrom) < np.array(size) / 2 * 1.667).all()
        np.testing.assert_allclose(
            particle.projections @ particle.projections.transpose(0, 2, 1),
            np.tile(np.eye(3), (37, 1, 1))[: len(particle.projections)],
            atol=1e-3,
        )
        assert all(1.5 < ctf.defocus_um < 4.5 for ctf in particle.ctfs)
    # ProjX is the first row of the matrix: what gives u
    text = (folder / "tomograms.star").read_text().split("data_Unt_050.tomostar")[1].split("[", 2)[1]
    np.testing.assert_allclose(
        particles[0].geometry.projections[0, 0], [float(part) for part in text.split("]")[0].split(",")[:3]]
    )
    turned = read_tilt_images(*data, opposite_hand=True)[0]
    half_turn = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(turned.projections, half_turn @ particles[0].projections)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_rlnTomoSubTomosAre2DStacks 1", "_rlnTomoSubTomosAre2DStacks 0", "not a set of particle tilt images"),
        ("1 4.0 16 2 1", "1 4.0 16 3 1", "not a set of particle tilt images"),
        ("1 4.0 16 2 1", "1 0 16 2 1", "table optics, column rlnImagePixelSize, row 1: 0, expected more than 0"),
        ("1 4.0 16 2 1", "1 4.0 -16 2 1", "column rlnImageSize, row 1: images of -16 pixels"),
        ("1 4.0 16 2 1", "1 4.0 16 2 7", "column rlnCtfDataAreCtfPremultiplied, row 1: 7"),
        ("1 4.0 16 2 1", "2 4.0 16 2 1", "table particles, column rlnOpticsGroup, row 1: '1' is no group"),
        ("TS TS/2", "TS_02 TS/2", "column rlnTomoName, row 2: tomograms.star has no tomogram 'TS_02'"),
        ("0 0 1 [1,1,1]", "0 0 1 [1,1]", "column rlnTomoVisibleFrames, row 2: 2 flags, the tomogram has 3 tilts"),
        ("0 0 1 [1,1,1]", "0 0 1 [1,2,1]", "flags must be 0 or 1"),
        ("0 0 1 [1,1,1]", "0 0 3 [1,1,1]", "column rlnRandomSubset, row 2: 3, expected 1 or 2"),
        ("-300 10 20", "-300 ten 20", "column rlnAngleRot, row 1: 'ten' is not a finite number"),
        ("_rlnAngleTilt", "_rlnAngleTipp", "no column rlnAngleTilt"),
        ("_rlnCenteredCoordinate", "_rlnElsewhere", "neither rlnCenteredCoordinate"),
        ("data_optics", "data_lenses", "no table data_optics"),
        ("TS tilts/TS.star 200", "TS tilts/TS.star -200", "table TS, row 1: voltage_kv is -200"),
        ("_rlnVoltage", "_rlnPotential", "no column rlnVoltage"),
        ("-1 1.35", "-1 0", "table global, column rlnTomoTiltSeriesPixelSize, row 1: 0"),
        ("_rlnTomoTiltSeriesStarFile", "_rlnOther", "no table 'TS' with the tomogram's tilts"),
        ("0 -60 85", "0 x 85", "tilts/TS.star: table TS, column rlnTomoYTilt, row 1: 'x'"),
        ("_rlnTomoYTilt", "_rlnTomoYTip", "align the tilt series first"),
        ("32000 10 0\n", "32000 10 -1\n", "column rlnMicrographPreExposure, row 1: -1, expected 0 or more"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    texts = [PARTICLES, TOMOGRAMS, TILTS.decode()]
    assert sum(old in text for text in texts) >= 1
    particles, tomograms, tilts = (text.replace(old, new) for text in texts)
    with pytest.raises(InvalidArgument, match=message.replace("[", "\\[")):
        read(particles, tomograms, tilts.encode())


def test_projections_that_are_no_rotations() -> None:
    tilts = b"""
data_TS

loop_
_rlnTomoProjX #1
_rlnTomoProjY #2
_rlnTomoProjZ #3
_rlnDefocusU #4
_rlnDefocusV #5
_rlnDefocusAngle #6
[1,0,0,0] [0,1,0,0] [0,0,1,0] 1 1 1
[1,0,0,0] [0,1,0,0] [0,0,-1,0] 1 1 1
[1,0,0,0] [0,1,0,0] [0,0,1,0] 1 1 1
"""
    with pytest.raises(InvalidArgument, match="row 2: the three rows are not those of a rotation"):
        read(tilts=tilts)
    with pytest.raises(InvalidArgument, match="row 1: 3 numbers, 4 were expected"):
        read(tilts=tilts.replace(b"[1,0,0,0]", b"[1,0,0]"))


def test_tilts_in_another_file_must_be_given() -> None:
    with pytest.raises(InvalidArgument, match="column rlnTomoTiltSeriesStarFile, row 1: the tilts lie in another file"):
        read_tilt_images(PARTICLES.encode(), TOMOGRAMS.encode())
