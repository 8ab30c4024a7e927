"""Picks edited by hand: what is done, undone and saved."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR
from cryofleet.particles import Particles
from cryofleet.views.histogram import Histogram, histogram_svg
from cryofleet.views.marks import colours, marks_on
from cryofleet.views.picks import Picks


def found() -> Picks:
    places = [[10.0, 20.0, 5.0], [30.0, 40.0, 8.0], [50.0, 60.0, 30.0]]
    particles = Particles.from_positions(places, 10.0, "t", id=np.array([3, 7, 9]), score=np.array([4.0, 2.0, 6.0]))
    return Picks.of(particles, 10.0)


def test_edits_can_be_undone_and_done_again() -> None:
    picks = found()
    before = picks.table.copy()
    added = picks.add((1.0, 2.0, 3.0), "ana")
    assert added == 10
    picks.move(7, (31.0, 40.0, 9.0), "ben")
    picks.remove(3)
    assert sorted(picks.table["id"]) == [7, 9, 10]
    assert picks.place(7) == (31.0, 40.0, 9.0)
    after = picks.table.copy()
    assert [picks.undo(), picks.undo(), picks.undo(), picks.undo()] == [3, 7, 10, None]
    pd.testing.assert_frame_equal(picks.table[before.columns], before, check_dtype=False)
    assert [picks.redo(), picks.redo(), picks.redo(), picks.redo()] == [10, 7, 3, None]
    pd.testing.assert_frame_equal(picks.table, after)
    picks.undo()
    # An id that somebody may have seen is never given to another pick, and a new edit leaves nothing to do again.
    assert picks.add((0.0, 0.0, 0.0), "ana") == 11
    assert picks.redo() is None
    with pytest.raises(InvalidArgument, match="no pick 99"):
        picks.remove(99)


def test_what_is_saved_has_ids_editors_and_the_threshold() -> None:
    picks = found()
    picks.add((1.0, 2.0, 3.0), "ana")
    picks.move(7, (31.0, 40.0, 9.0), "ben")
    saved = picks.to_particles(10.0, (40, 70, 80), "t", least_score=5.0)
    again = Particles.from_parquet(saved.to_parquet())
    # Of the two below the threshold, the one that was moved by hand stays.
    assert list(again.table["id"]) == [7, 9, 10]
    assert list(again.table["editor"]) == ["ben", "", "ana"]
    assert again.tomogram_shape == (40, 70, 80)
    np.testing.assert_array_equal(again.positions()[0], [31.0, 40.0, 9.0])
    with pytest.raises(InvalidArgument, match="lower the threshold"):
        found().to_particles(10.0, (40, 70, 80), "t", least_score=7.0)


def test_picks_of_another_binning_lie_where_their_shifts_take_them() -> None:
    particles = Particles.from_positions(
        [[10.0, 20.0, 5.0], [1.0, 1.0, 1.0]], 20.0, shift_x=[1.0, 0.0], shift_y=[0.0, 0.0], shift_z=[-2.0, 0.0]
    ).with_columns(tomogram=np.array(["a", "b"], object))
    picks = Picks.of(particles, 10.0, "a")
    np.testing.assert_array_equal(picks.positions, [[22.0, 40.0, 6.0]])


def test_circles_are_sections_of_spheres() -> None:
    picks = found()
    plain = colours(picks.table, picks.scores, "one colour")
    [first, second] = marks_on(picks, "z", 5, 1, 5.0, plain)
    assert first[:4] == (3, 10.0, 20.0, 5.0)
    assert second[:3] == (7, 30.0, 40.0)
    assert second[3] == pytest.approx(4.0)  # 3 planes off: the 3-4-5 triangle
    assert second[5] < first[5] == 1.0
    [sideways] = marks_on(picks, "x", 50, 1, 5.0, plain)
    assert sideways[:3] == (9, 60.0, 30.0)  # y, z
    assert [mark[0] for mark in marks_on(picks, "z", 5, 1, 5.0, plain, least_score=3.0)] == [3]
    assert len(marks_on(picks, "z", 11, 7, 1.0, plain)) == 1  # of the slab of planes 8 to 14


def test_colours_tell_classes_and_scores_apart() -> None:
    names = [f"c{number}" for number in range(9)]
    table = pd.DataFrame({"class_name": names})
    of_class = colours(table, np.full(9, np.nan), "class")
    assert of_class[:7] == list(CLASS_COLOURS)
    assert set(of_class[7:]) == {OTHER_CLASSES_COLOUR}
    by_score = colours(table, np.arange(9.0), "score")

    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    # Brightness alone tells the order, to whoever sees no hues.
    assert np.all(np.diff([luminance(colour) for colour in by_score[1:-1]]) > 0)


def test_a_histogram_has_a_bar_for_each_score() -> None:
    drawn = histogram_svg(Histogram.of(np.array([0.0, 1.0, 4.0, np.nan]), 2.0), 2.0)
    heights = [float(part.split('"')[0]) for part in drawn.split('height="')[1:]]
    assert sum(height > 0 for height in heights) == 3
    assert 'opacity="1"' in drawn
    assert histogram_svg(Histogram.of(np.array([np.nan]), 2.0), 2.0) == ""
