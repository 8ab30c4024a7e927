from __future__ import annotations

import pytest

from cryofleet.errors import InvalidArgument, NotFound
from cryofleet.settings import Settings
from orchestrator.library import Library
from orchestrator.pipeline import Pipeline
from orchestrator.pipeline_reading import load

GOOD = """\
name: sound
help: A pipeline without a fault.
inputs:
  tomogram: {kind: volume, help: the tomogram}
  truth: {kind: particles, optional: true}
  volumes: {kind: volume, list: true, optional: true}
parameters:
  diameter: {type: number, default: 200, unit: Å, help: the diameter}
  box: {type: integer, default: 32}
  sign: {type: text, default: dark, choices: [dark, light]}
steps:
  - id: pick
    op: picking.DifferenceOfGaussians
    with:
      tomogram_uri: ${tomogram}
      particle_diameter_angstrom: ${diameter}
      contrast: ${sign}
  - id: boxes
    op: picking.Extract
    with:
      tomogram_uri: ${tomogram}
      particles_uri: ${pick.particles_uri}
      box_size_voxels: ${box}
    shards:
      over: particles_uri
      size: 100
      reduce:
        op: picking.MergeSubtomograms
        field: subtomograms_uris
  - id: compare
    if: ${truth}
    op: picking.Evaluate
    with:
      particles_uri: ${pick.particles_uri}
      truth_uri: ${truth}
      distance_angstrom: 50
  - id: each
    foreach: ${volumes}
    as: volume
    steps:
      - id: smooth
        op: io.Filter
        with:
          volume_uri: ${volume}
      - id: find
        op: picking.DifferenceOfGaussians
        with:
          tomogram_uri: ${smooth.volume_uri}
          particle_diameter_angstrom: ${diameter}
  - id: joined
    if: ${volumes}
    op: picking.MergeParticles
    with:
      particles_uris: ${each.find.particles_uri}
outputs:
  picks: ${pick.particles_uri}
  boxes: ${boxes.subtomograms_uri}
  found: ${each.find.count}
"""


def pipeline() -> Pipeline:
    return load(GOOD, "sound.yaml")


def line_of(text: str, part: str) -> int:
    """The number of the line on which `part` stands, in `text`."""
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


def test_a_sound_pipeline() -> None:
    found = pipeline()
    assert [step.id for step in found.steps] == ["pick", "boxes", "compare", "each", "joined"]
    boxes = found.steps[1]
    assert boxes.shards is not None
    assert boxes.shards.into == "rows"
    assert boxes.shards.reduce is not None
    assert boxes.shards.reduce.output == "subtomograms_uri"
    assert [str(reference) for reference in found.steps[3].references()] == ["${volumes}", "${diameter}"]
    # Among the items of a list, a list stands for its items.
    load(
        GOOD.replace(
            "particles_uris: ${each.find.particles_uri}",
            'particles_uris: ["${truth}", "${each.find.particles_uri}"]',
        ),
        "sound.yaml",
    )
    # Each of several conditions makes sure of its value.
    load(GOOD.replace("if: ${truth}", 'if: ["${diameter}", "${truth}"]'), "sound.yaml")


# Each case: what is replaced, by what, the line that the error must name (by text on it), and what it must say.
FAULTS = {
    "unknown operation": ("op: picking.Evaluate", "op: picking.Evalute", "Evalute", "did you mean 'picking.Evaluate'"),
    "unknown parameter": ("distance_angstrom: 50", "distance: 50", "distance: 50", "did you mean 'distance_angstrom'"),
    "missing parameter": ("      distance_angstrom: 50\n", "", "- id: compare", "needs 'distance_angstrom'"),
    "wrong literal": ("distance_angstrom: 50", "distance_angstrom: far", "far", "must be a number"),
    "wrong reference": (
        "box_size_voxels: ${box}",
        "box_size_voxels: ${diameter}",
        "box_size_voxels:",
        "takes an integer",
    ),
    "wrong kind": (
        "truth_uri: ${truth}",
        "truth_uri: ${tomogram}",
        "truth_uri:",
        "takes particles; ${tomogram} is a vol",
    ),
    "unknown reference": ("${box}", "${bx}", "${bx}", "unknown reference ${bx}; did you mean 'box'"),
    "unknown output": ("truth_uri: ${truth}", "truth_uri: ${pick.picks}", "pick.picks", "'pick' has no output 'picks'"),
    "a step is no value": ("truth_uri: ${truth}", "truth_uri: ${pick}", "${pick}", "say which of its outputs"),
    "a list for one": (
        "truth_uri: ${truth}",
        "truth_uri: ${each.find.particles_uri}",
        "truth_uri:",
        "takes particles; ${each.find.particles_uri} is a list of particles",
    ),
    "one for a list": (
        "particles_uris: ${each.find.particles_uri}",
        "particles_uris: ${pick.particles_uri}",
        "particles_uris:",
        "takes a list of particles",
    ),
    "another kind among a list's items": (
        "particles_uris: ${each.find.particles_uri}",
        'particles_uris: ["${each.smooth.volume_uri}"]',
        "particles_uris:",
        "particles_uris[0] takes particles; ${each.smooth.volume_uri} is a list of volume",
    ),
    "duplicate id": ("- id: compare", "- id: pick", "- id: pick", "the name 'pick' is taken"),
    "duplicate key": ("    if: ${truth}", "    if: ${truth}\n    if: ${truth}", None, "'if' stands here twice"),
    "cycle": (
        "${diameter}\n      contrast",
        "${compare.f1}\n      contrast",
        "- id: pick",
        "in a circle: pick -> compare",
    ),
    "may be missing though another is there": (
        "    if: ${truth}\n",
        '    if: ["${volumes}", "${tomogram}"]\n',
        "truth_uri:",
        "'if: ${truth}'",
    ),
    "a condition that is no reference": (
        "    if: ${truth}\n",
        '    if: ["${truth}", "truth"]\n',
        '"truth"',
        "'if' must be a reference",
    ),
    "may be missing": ("    if: ${truth}\n", "", "truth_uri:", "'if: ${truth}'"),
    "foreach over one": ("foreach: ${volumes}", "foreach: ${tomogram}", "foreach:", "foreach needs a list"),
    "shards over nothing": (
        "over: particles_uri",
        "over: tomogram_uri",
        "over:",
        "cannot be split over 'tomogram_uri'",
    ),
    "shards into nothing": ("size: 100", "into: box_size_voxels", "into:", "takes no range of rows"),
    "bad size": ("size: 100", "size: none", "size:", "must be an integer of at least 1"),
    "a size from its own step": ("size: 100", "size: ${boxes.count}", "- id: boxes", "in a circle: boxes -> boxes"),
    "bad reduce": ("field: subtomograms_uris", "field: particles_uris", "field: part", "takes no list of results"),
    "reduce of another kind": (
        "op: picking.MergeSubtomograms\n        field: subtomograms_uris",
        "op: picking.MergeParticles\n        field: particles_uris",
        "field: particles_uris",
        "takes particles, of which picking.Extract gives 0",
    ),
    "unknown kind": ("kind: volume, help", "kind: volum, help", "kind: volum,", "did you mean 'volume'"),
    "unknown type": ("{type: integer", "{type: int", "{type: int", "unknown type 'int'"),
    "missing type": ("diameter: {type: number, default: 200, ", "diameter: {", "diameter: {", "'type' is missing"),
    "bad default": ("default: 32", "default: big", "default: big", "it must be an integer"),
    "unknown key": ("    if: ${truth}", "    when: ${truth}", "when:", "a step has no 'when'"),
    "unknown output's reference": ("picks: ${pick.particles_uri}", "picks: ${pik.x}", "pik.x", "unknown reference"),
    "malformed reference": ("picks: ${pick.particles_uri}", "picks: ${pick.}", "${pick.}", "no reference"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_place(fault: str) -> None:
    old, new, marked, told = FAULTS[fault]
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    with pytest.raises(InvalidArgument) as caught:
        load(text, "bad.yaml")
    lines = str(caught.value).splitlines()
    matching = [line for line in lines if told in line]
    assert matching, lines
    assert all(line.startswith("bad.yaml:") for line in lines)
    if marked is not None:
        number = int(matching[0].split(":")[1])
        assert marked in text.splitlines()[number - 1]


def test_what_is_no_yaml() -> None:
    with pytest.raises(InvalidArgument, match=r"bad\.yaml:2: not YAML"):
        load("name: x\nsteps: [}\n", "bad.yaml")
    with pytest.raises(InvalidArgument, match=r"bad\.yaml:1: a pipeline must be a mapping"):
        load("- a\n- b\n", "bad.yaml")


def test_a_foreach_needs_steps() -> None:
    text = "name: x\nparameters:\n  l: {type: list}\nsteps:\n  - id: each\n    foreach: ${l}\n    steps: []\n"
    with pytest.raises(InvalidArgument, match=r"bad\.yaml:7: 'steps' must be a list of one step at least"):
        load(text, "bad.yaml")


def test_foreach_has_a_greatest_depth() -> None:
    text = "name: deep\nparameters:\n  l: {type: list}\nsteps:\n"
    indent = "  "
    for level in range(4):
        text += f"{indent}- id: s{level}\n{indent}  foreach: ${{l}}\n{indent}  as: i{level}\n{indent}  steps:\n"
        indent += "    "
    text += f"{indent}- id: last\n{indent}  op: runtime.SelfTest\n"
    with pytest.raises(InvalidArgument, match="foreach goes 3 deep at most"):
        load(text, "deep.yaml")


def test_defaults_and_whole_numbers() -> None:
    values = pipeline().bind({"tomogram": "file:///t.mrc", "box": 48.0})
    assert values["diameter"] == 200
    assert values["box"] == 48
    assert isinstance(values["box"], int)
    assert values["truth"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "needs 'tomogram', the tomogram"),
        ({"tomogram": "t.mrc"}, "must be the URI of a volume"),
        ({"tomogram": "file:///t", "diametre": 3}, "did you mean 'diameter'"),
        ({"tomogram": "file:///t", "diameter": "wide"}, "diameter is 'wide'; it must be a number"),
        ({"tomogram": "file:///t", "box": 4.5}, "box is 4.5; it must be an integer"),
        ({"tomogram": "file:///t", "sign": "grey"}, "must be one of dark, light"),
        ({"tomogram": "file:///t", "volumes": "file:///v"}, "must be a list of URIs"),
        ({"tomogram": "file:///t", "diameter": -1}, f"sound.yaml:{line_of(GOOD, '{diameter}')}: step 'pick'"),
        ({"tomogram": "file:///t", "box": 2}, "box_size_voxels is 2: must be greater than or equal to 4"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pipeline().bind(arguments)
    assert told in str(caught.value)
    assert all(line.startswith("sound.yaml") for line in str(caught.value).splitlines())


def test_a_list_of_structures_is_checked_before_anything_runs() -> None:
    simulate = Library(Settings.from_environment({})).get("simulate-tomogram")
    with pytest.raises(InvalidArgument, match=r"simulate-tomogram\.yaml:\d+: step 'scene'.*cont"):
        simulate.bind({"structures": [{"name": "double-ring", "cont": 3}]})
    with pytest.raises(InvalidArgument, match=r"structures is .*no such name"):
        simulate.bind({"structures": [{"name": "no such name", "count": 3}]})


def test_all_shipped_pipelines_are_sound() -> None:
    library = Library(Settings.from_environment({}))
    shipped = "discover reconstruct self-test simulate-dataset simulate-subtomograms simulate-tomogram"
    assert set(shipped.split()) <= set(library.names())
    for name in library.names():
        found = library.get(name)
        assert found.help
        assert all(argument.help for argument in found.arguments), name
    with pytest.raises(NotFound, match="did you mean 'discover'"):
        library.get("discovery")


def test_items_that_are_structures_have_fields_and_others_have_none() -> None:
    text = """\
name: many
help: Items with fields.
inputs:
  tomogram: {kind: volume, help: the tomogram}
parameters:
  sizes: {type: list, default: [{diameter: 100}], help: what to look for}
  size: {type: number, default: 100, help: one size}
steps:
  - id: each
    foreach: ${sizes}
    as: size_of
    steps:
      - id: pick
        op: picking.DifferenceOfGaussians
        with: {tomogram_uri: "${tomogram}", particle_diameter_angstrom: "${FIELD}"}
outputs:
  picks: ${each.pick.particles_uri}
"""
    load(text.replace("FIELD", "size_of.diameter"), "many.yaml")
    with pytest.raises(InvalidArgument, match=r"asks for a part of 'size', which has none"):
        load(text.replace("FIELD", "size.diameter"), "many.yaml")


def test_lists_of_lists_go_into_a_field_that_takes_a_list() -> None:
    text = """\
name: clusters
help: All clusters of several sets.
inputs:
  sets: {kind: subtomograms, list: true, help: the sets}
  model: {kind: model, help: the encoder}
steps:
  - id: each
    foreach: ${sets}
    as: boxes
    steps:
      - id: cluster
        op: learning.Cluster
        with: {subtomograms_uri: "${boxes}", model_uri: "${model}"}
  - id: together
    op: picking.MergeParticles
    with: {particles_uris: "${FIELD}"}
  - id: rounds
    repeat: 2
    carry: {tables: "${FIRST}"}
    next: {tables: "${rounds.tables}"}
    steps:
      - id: again
        op: picking.MergeParticles
        with: {particles_uris: "${rounds.tables}"}
outputs:
  particles: ${together.particles_uri}
"""
    good = text.replace("FIELD", "each.cluster.largest_uris").replace("FIRST", "each.cluster.largest_uris")
    load(good, "clusters.yaml")
    with pytest.raises(InvalidArgument, match="sizes} is a list of a list of integer"):
        load(good.replace("each.cluster.largest_uris", "each.cluster.sizes", 1), "clusters.yaml")
    # What is carried stays what it is: a list cannot follow a list of lists.
    with pytest.raises(InvalidArgument, match="a list of a list of particles in the first round"):
        load(good.replace('next: {tables: "${rounds.tables}"}', 'next: {tables: ["${model}"]}'), "clusters.yaml")
