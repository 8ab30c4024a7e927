"""Pictures of volumes: slices, what is drawn on them, montages and movies."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR, overlay, rgb
from services.io import drawing, montage, movie, slices
from services.io.drawing import Footer, GreyLevels
from services.io.figures import Circle, grey
from services.io.picks import Picks, circles_on, class_colours
from services.io.slices import Axis, Slab

RNG = np.random.default_rng(5)
SHAPE = (24, 50, 64)
VOLUME = RNG.normal(0, 1, SHAPE).astype(np.float32)
LEVELS = GreyLevels(-2.0, 2.0)


def read(first: int, last: int) -> NDArray[np.float32]:
    slab: NDArray[np.float32] = VOLUME[first:last]
    return slab


# --- Slices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "number"), [("z", 0), ("y", 1), ("x", 2)])
@pytest.mark.parametrize(("position", "thickness"), [(10, 1), (11, 5), (0, 4), (20, 1000)])
def test_a_slice_is_the_mean_of_its_slab(axis: Axis, number: int, position: int, thickness: int) -> None:
    slab = slices.slab_at(SHAPE, axis, position, thickness)
    half = round((thickness - 1) / 2)
    expected = np.take(VOLUME, range(max(0, position - half), min(SHAPE[number], position + half + 1)), axis=number)
    found = slices.mean_slices(read, SHAPE, [slab])[0]
    assert found.shape == slices.picture_shape(SHAPE, axis)
    np.testing.assert_allclose(found, expected.mean(axis=number), atol=1e-6)


def test_the_same_slab_twice() -> None:
    # So it is where thick slabs all reach from end to end.
    slabs = [slices.slab_at(SHAPE, axis, position, 999) for axis in ("z", "y") for position in (3, 9)]
    first, second, third, fourth = slices.mean_slices(read, SHAPE, slabs)
    np.testing.assert_allclose(first, VOLUME.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, fourth)


def test_slices_read_little_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_SLAB_BYTES", 3 * 4 * 50 * 64)
    asked: list[tuple[int, int]] = []

    def watched(first: int, last: int) -> NDArray[np.float32]:
        asked.append((first, last))
        return VOLUME[first:last]

    flat = [Slab("z", 7, 12), Slab("z", 20, 21)]
    for slab, found in zip(flat, slices.mean_slices(watched, SHAPE, flat), strict=True):
        np.testing.assert_allclose(found, VOLUME[slab.first : slab.last].mean(axis=0), atol=1e-6)
    assert asked == [(7, 9), (9, 12), (20, 21)]
    asked.clear()
    both = slices.mean_slices(watched, SHAPE, [*flat, Slab("x", 5, 7)])
    np.testing.assert_allclose(both[2], VOLUME[:, :, 5:7].mean(axis=2), atol=1e-6)
    assert asked == [(first, first + 3) for first in range(0, 24, 3)]


# --- What is drawn -------------------------------------------------------------------------------------------------


def test_a_picture_is_its_grey_values() -> None:
    values = RNG.normal(0, 1, (400, 350)).astype(np.float32)
    plain = drawing.draw(values, LEVELS, 10.0)
    assert plain.mode == "L"
    np.testing.assert_array_equal(np.asarray(plain), grey(values, -2, 2))
    inverted = drawing.draw(values, GreyLevels(-2.0, 2.0, inverted=True), 10.0)
    np.testing.assert_array_equal(np.asarray(inverted), 255 - grey(values, -2, 2))


def test_large_slices_are_averaged_and_small_ones_enlarged() -> None:
    values = RNG.normal(0, 1, (400, 600)).astype(np.float32)
    small = np.asarray(drawing.draw(values, LEVELS, 10.0, longest_side=300)).astype(float)
    means = values.reshape(200, 2, 300, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(small, grey(means, -2, 2), atol=1)
    tiny = values[:40, :60]
    np.testing.assert_array_equal(
        np.asarray(drawing.draw(tiny, LEVELS, 10.0)), grey(tiny, -2, 2).repeat(8, axis=0).repeat(8, axis=1)
    )


def ring(image: Image.Image, x: float, y: float, radius: float) -> NDArray[np.float64]:
    """Colours at 64 places of a circle."""
    angle = 2 * np.pi * np.arange(64) / 64
    pixels = np.asarray(image).astype(float)
    rows, columns = np.rint(y + radius * np.sin(angle)).astype(int), np.rint(x + radius * np.cos(angle)).astype(int)
    colours: NDArray[np.float64] = pixels[rows, columns]
    return colours


@pytest.mark.parametrize(("side", "longest", "scale"), [(400, 2048, 1.0), (80, 2048, 6.0), (800, 400, 0.5)])
def test_circles_are_where_they_belong(side: int, longest: int, scale: float) -> None:
    values = np.zeros((side, side), np.float32)
    circle = Circle(0.4 * side, 0.6 * side, 0.1 * side, "#e69f00", 1.0, "")
    image = drawing.draw(values, LEVELS, 10.0, [circle], longest_side=longest)
    x, y = (0.4 * side + 0.5) * scale - 0.5, (0.6 * side + 0.5) * scale - 0.5
    radius = 0.1 * side * scale
    # Rounded to a pixel the place is up to 0.7 off the line, which then covers at least a third of it.
    away = np.abs(ring(image, x, y, radius) - rgb("#e69f00")).max(axis=1)
    assert away.max() < 120
    assert away.mean() < 40
    untouched = np.hypot(*(np.indices(image.size) - np.array([y, x])[:, None, None])) - radius
    np.testing.assert_array_equal(np.asarray(image)[np.abs(untouched) > 5], 128)


def test_labels_lie_over_the_grey() -> None:
    values, labels = np.zeros((320, 320), np.float32), np.zeros((320, 320), np.uint16)
    labels[100:140, 200:260] = 2
    image = drawing.draw(values, LEVELS, 10.0, labels=labels)
    np.testing.assert_array_equal(np.asarray(image), overlay(grey(values, -2, 2), labels))
    half = np.asarray(drawing.draw(values, LEVELS, 10.0, labels=labels, longest_side=160))
    coloured = half.max(axis=2) > half.min(axis=2)
    assert coloured[50:70, 100:130].all()
    assert coloured.sum() == 20 * 30


@pytest.mark.parametrize(("pixel_angstrom", "longest", "bar"), [(10.0, 400, 100), (7.5, 400, 67), (10.0, 200, 50)])
def test_the_scale_bar_has_its_length(pixel_angstrom: float, longest: int, bar: int) -> None:
    # 400 voxels are 400 or 300 nm wide: 100 or 50 nm is the round length up to a quarter.
    values = np.full((300, 400), -2, np.float32)
    image = np.asarray(drawing.draw(values, LEVELS, pixel_angstrom, footer=Footer("z 7"), longest_side=longest))
    runs = [max((len(list(g)) for white, g in itertools.groupby(row == 255) if white), default=0) for row in image]
    assert max(runs) == bar
    assert int(np.argmax(runs)) > 300 * longest / 400


@pytest.mark.parametrize("width", [120, 60])
def test_a_footer_is_no_wider_than_its_picture(width: int) -> None:
    values = np.zeros((512, width), np.float32)
    footer = Footer("along x, x 90 to 110", [("#e69f00", "a class of a long name")])
    image = drawing.draw(values, LEVELS, 10.0, footer=footer)
    # the scale's words need some 70 pixels
    assert image.width == max(width, image.width if width < 80 else width) <= max(width, 80)
    other = drawing.draw(values, LEVELS, 10.0, footer=Footer("along x, x 9 to 11", footer.legend))
    assert other.size == image.size, "all pictures of a movie are of one size"


def test_any_name_is_written_as_text_on_one_line() -> None:
    assert drawing.printable("<b>a</b>\n\x1b[31m") == "<b>a</b>  [31m"
    assert len(drawing.printable("a" * 1000)) == 60
    values = np.zeros((320, 320), np.float32)
    legend = [("#e69f00", f"<script>{number}</script>\x00☃") for number in range(12)]
    image = drawing.draw(values, LEVELS, 10.0, footer=Footer("x" * 500, legend))
    assert image.width == 320
    assert drawing.png(image) == drawing.png(drawing.draw(values, LEVELS, 10.0, footer=Footer("x" * 500, legend)))


# --- Picks ---------------------------------------------------------------------------------------------------------


def test_picks_on_slices() -> None:
    picks = Picks(np.array([[10.0, 20.0, 5.0], [30.0, 21.0, 9.0], [50.0, 4.0, 13.5]]), 80.0, ["a", "b", "a"])
    colours = class_colours(picks.names(), CLASS_COLOURS, OTHER_CLASSES_COLOUR)

    def places(slab: Slab) -> list[tuple[float, float, str, float]]:
        return [(c.x, c.y, c.colour, round(c.opacity, 4)) for c in circles_on(picks, slab, 10.0, colours)]

    first, second = CLASS_COLOURS[:2]
    # A radius of 4 voxels: the first reaches into section 9 from below, the third into 10 from above.
    assert places(Slab("z", 9, 10)) == [(10, 20, first, 0.35), (30, 21, second, 1)]
    assert places(Slab("z", 8, 11)) == [(10, 20, first, 0.5125), (30, 21, second, 1), (50, 4, first, 0.4312)]
    assert places(Slab("y", 4, 5)) == [(50, 13.5, first, 1)]
    assert places(Slab("x", 30, 31)) == [(21, 9, second, 1)]


def test_classes_beyond_the_colours_share_one() -> None:
    names = [f"class {number}" for number in range(9) for _ in range(9 - number)]
    colours = class_colours(names, CLASS_COLOURS, OTHER_CLASSES_COLOUR)
    assert [entry[1:] for entry in colours.legend()] == [
        *((f"class {number}", 9 - number) for number in range(7)),
        ("2 others", 3),
    ]
    assert colours.of("class 8") == OTHER_CLASSES_COLOUR


# Machado, Oliveira & Fernandes 2009, IEEE Trans. Vis. Comput. Graph. 15, 1291: table 1, severity 1.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_everybody_can_tell_the_classes_colours_apart(deficiency: str) -> None:
    colours = np.array([rgb(colour) for colour in CLASS_COLOURS]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(DEFICIENCIES[deficiency]).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
    # A difference of 2.3 is just noticed side by side (Mahy et al. 1994, Color Res. Appl. 19, 105).
    pairs = np.array(list(itertools.combinations(lab, 2)))
    assert deltaE_ciede2000(pairs[:, 0], pairs[:, 1]).min() > 4 * 2.3  # type: ignore[no-untyped-call]


# --- Montage -------------------------------------------------------------------------------------------------------

BOXES = RNG.normal(0, 1, (7, 16, 16, 16)).astype(np.float32) + np.arange(7, dtype=np.float32)[:, None, None, None]


def tiles(image: Image.Image, side: int, columns: int, count: int, wide: int) -> list[NDArray[np.uint8]]:
    pixels = np.asarray(image)
    return [
        pixels[4 + n // columns * (side + 20) :, 4 + n % columns * (wide + 4) :][:side, :wide] for n in range(count)
    ]


def test_a_montage_has_the_particles_in_their_order() -> None:
    rows = [4, 0, 6, 2]
    asked: list[int] = []

    def box(row: int) -> NDArray[np.float32]:
        asked.append(row)
        found: NDArray[np.float32] = BOXES[row]
        return found

    image = montage.sheet(box, rows, ["a", "b", "c", "d"], 16, 10.0, tile_pixels=40, percentiles=(0, 100))
    shown = tiles(image, 32, 2, 4, 32)
    slices_ = np.stack([BOXES[row][8] for row in rows])
    for tile, values in zip(shown, slices_, strict=True):
        expected = grey(values, float(slices_.min()), float(slices_.max()))
        np.testing.assert_array_equal(tile, expected.repeat(2, axis=0).repeat(2, axis=1))
    assert asked == sorted(rows)


def test_projections_orthogonal_slices_and_limits_of_each() -> None:
    box = BOXES[0]
    np.testing.assert_allclose(montage.particle_pictures(box, "projection")[0], box.mean(axis=0), atol=1e-6)
    xy, xz, yz = montage.particle_pictures(box, "orthogonal", 3)
    np.testing.assert_allclose(xy, box[7:10].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(xz, box[:, 7:10].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(yz, box[:, :, 7:10].mean(axis=2).T, atol=1e-6)
    image = montage.sheet(
        BOXES.__getitem__,
        [0, 6],
        ["", ""],
        16,
        10.0,
        own_limits=True,
        percentiles=(0, 100),
        inverted=True,
        tile_pixels=8,
    )
    for tile, row in zip(tiles(image, 8, 2, 2, 8), (0, 6), strict=True):
        means = BOXES[row][8].reshape(8, 2, 8, 2).mean(axis=(1, 3))
        np.testing.assert_allclose(
            tile.astype(float), 255 - grey(means, means.min(), means.max()).astype(float), atol=1
        )


# --- Movie ---------------------------------------------------------------------------------------------------------


def test_frames_thin_out_evenly() -> None:
    slabs = movie.frame_slabs(SHAPE, "x", 4, 64, 1, 20)
    assert [slab.first for slab in slabs] == list(range(4, 64, 3))
    assert len(movie.frame_slabs(SHAPE, "x", 0, 64, 1, 64)) == 64
    assert movie.frame_slabs(SHAPE, "z", 0, 24, 3, 2) == [Slab("z", 0, 2), Slab("z", 11, 14)]


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_frames_along_any_axis(axis: Axis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movie, "_ROWS_BYTES", 5 * 4 * 50 * 64)
    slabs = movie.frame_slabs(SHAPE, axis, 2, 20, 3, 6)
    with movie.open_frames(read, SHAPE, slabs, tmp_path) as frame:
        for number in (5, 0, 3):
            np.testing.assert_allclose(frame(number), slices.mean_slices(read, SHAPE, [slabs[number]])[0], atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_movie_has_its_frames() -> None:
    made: list[int] = []

    def image(number: int) -> Image.Image:
        made.append(number)
        values = np.zeros((60, 80), np.float32)
        values[10 * number : 10 * number + 10] = 1
        return Image.fromarray(grey(values, 0, 1))

    encoded = movie.animated_webp(image, 5, 20.0, 90)
    with Image.open(io.BytesIO(encoded)) as opened:
        assert (opened.format, getattr(opened, "n_frames", 1), opened.size, opened.info["loop"]) == (
            "WEBP",
            5,
            (80, 60),
            0,
        )
        for number in range(5):
            opened.seek(number)
            shown = np.asarray(opened.convert("L")).astype(float)
            assert opened.info["duration"] == 50
            # Lossy: what was black and white is nearly so.
            np.testing.assert_allclose(shown, np.asarray(image(number)), atol=40)
    assert made[:5] == [0, 1, 2, 3, 4]
    assert encoded == movie.animated_webp(image, 5, 20.0, 90)
