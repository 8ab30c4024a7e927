"""The operations as the contract documents them."""

from __future__ import annotations

import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.operations import (
    find_operation,
    inputs_of,
    operations,
    parameters_of,
    request_from_mapping,
    resolve_defaults,
    result_from_mapping,
    result_to_mapping,
)
from cryofleet.v1 import io_pb2, picking_pb2, simulation_pb2


def test_every_operation_is_documented() -> None:
    for operation in operations().values():
        assert operation.help.endswith("."), operation.name
        assert operation.version >= 1
        assert operation.stall_limit_seconds > 0
        for parameter in operation.parameters:
            assert parameter.help, f"{operation.name}.{parameter.name}"


def test_names_units_and_defaults_come_from_the_contract() -> None:
    dog = find_operation("picking.DifferenceOfGaussians")
    by_name = {parameter.name: parameter for parameter in dog.parameters}
    assert dog.full_name == "/cryofleet.v1.PickingService/DifferenceOfGaussians"
    assert by_name["particle_diameter_angstrom"].unit == "Å"
    assert by_name["particle_diameter_angstrom"].required
    assert by_name["sigma_ratio"].default == 1.1
    assert not by_name["sigma_ratio"].required
    assert by_name["tomogram_uri"].type == "volume"
    assert by_name["contrast"].choices == ("dark", "light")
    assert "context" not in by_name


def test_unknown_operation_names_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match=r"did you mean 'picking\.Extract'"):
        find_operation("picking.Extrakt")


def test_defaults_fill_only_what_was_left_out() -> None:
    request = picking_pb2.DifferenceOfGaussiansRequest(threshold=0)
    resolved = resolve_defaults(request)
    assert isinstance(resolved, picking_pb2.DifferenceOfGaussiansRequest)
    assert resolved.threshold == 0
    assert resolved.sigma_ratio == 1.1
    assert not request.HasField("sigma_ratio")


def test_a_name_left_out_is_that_of_the_file_and_counts() -> None:
    ingest = io_pb2.IngestRequest(source_uri="s3://bucket/raw/TS 01.mrc.gz")
    assert parameters_of(ingest)["name"] == "TS_01"
    assert parameters_of(io_pb2.IngestRequest(source_uri=ingest.source_uri, name="a"))["name"] == "a"


def test_identity_has_no_uris_and_no_context() -> None:
    request = picking_pb2.ExtractRequest(tomogram_uri="file:///a", particles_uri="file:///b", box_size_voxels=32)
    request.context.run_id = "r"
    parameters = parameters_of(request)
    assert inputs_of(request) == {"tomogram_uri": ["file:///a"], "particles_uri": ["file:///b"]}
    assert parameters["box_size_voxels"] == 32
    assert "context" not in parameters
    assert "file:///a" not in str(parameters)


def test_an_explicit_default_has_the_same_identity() -> None:
    silent = picking_pb2.ExtractRequest(tomogram_uri="a", particles_uri="b", box_size_voxels=32)
    spoken = picking_pb2.ExtractRequest(tomogram_uri="a", particles_uri="b", box_size_voxels=32, binning=1)
    other = picking_pb2.ExtractRequest(tomogram_uri="a", particles_uri="b", box_size_voxels=32, binning=2)
    assert parameters_of(silent) == parameters_of(spoken)
    assert parameters_of(silent) != parameters_of(other)


def test_nested_inputs_keep_their_places() -> None:
    request = simulation_pb2.SimulateSceneRequest()
    request.structures.add(name="double-ring", count=2)
    request.structures.add(name="mine", count=1, source_uri="file:///x.pdb")
    assert inputs_of(request) == {"structures.source_uri": ["", "file:///x.pdb"]}
    assert [s["name"] for s in parameters_of(request)["structures"]] == ["double-ring", "mine"]


def test_a_request_from_text_as_a_command_line_has_it() -> None:
    operation = find_operation("simulation.SimulateSubtomograms")
    mapping = {
        "box_size_voxels": "64",
        "snr": "0.1",
        "contrast": "light",
        "structures": [{"name": "barrel", "count": 3}],
        "tilt_scheme": {"order": "sequential"},
    }
    request = request_from_mapping(operation, mapping)
    assert isinstance(request, simulation_pb2.SimulateSubtomogramsRequest)
    assert (request.box_size_voxels, request.snr, request.contrast) == (64, 0.1, 2)
    assert request.structures[0].count == 3
    assert request.tilt_scheme.order == simulation_pb2.TILT_ORDER_SEQUENTIAL


def test_messages_inside_a_request_have_their_defaults_too() -> None:
    request = simulation_pb2.SimulateTiltSeriesRequest(tilt_scheme=simulation_pb2.TiltScheme(tilt_step_degrees=2))
    resolved = resolve_defaults(request)
    assert isinstance(resolved, simulation_pb2.SimulateTiltSeriesRequest)
    assert (resolved.tilt_scheme.tilt_step_degrees, resolved.tilt_scheme.tilt_max_degrees) == (2, 60)
    assert resolved.microscope.voltage_kv == 300, "a message that was left out has them as well"
    scene = simulation_pb2.SimulateSceneRequest(vesicles=[simulation_pb2.Vesicles(count=1)])
    resolved_scene = resolve_defaults(scene)
    assert isinstance(resolved_scene, simulation_pb2.SimulateSceneRequest)
    assert resolved_scene.vesicles[0].radius_max_angstrom == 500
    spoken = simulation_pb2.SimulateTiltSeriesRequest(
        tilt_scheme=simulation_pb2.TiltScheme(tilt_step_degrees=2), microscope=simulation_pb2.Microscope(voltage_kv=300)
    )
    assert parameters_of(request) == parameters_of(spoken)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"box_size": 3}, r"no parameter 'box_size'; did you mean 'box_size_voxels'"),
        ({"box_size_voxels": 2.5}, "must be a whole number"),
        ({"box_size_voxels": True}, "must be a whole number"),
        ({"box_size_voxels": 2**40}, "at most 31 bits"),
        ({"snr": "loud"}, "snr is 'loud'; it must be a number"),
        ({"contrast": "grey"}, "must be one of dark, light"),
        ({"structures": {"name": "a"}}, "must be a list"),
        ({"structures": [{"nam": "a"}]}, r"no parameter 'structures\[0\]\.nam'; did you mean 'name'"),
        ({"context": {}}, "no parameter 'context'"),
    ],
)
def test_wrong_fields_are_named(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        request_from_mapping(find_operation("simulation.SimulateSubtomograms"), mapping)


def test_results_go_through_json_and_back() -> None:
    operation = find_operation("learning.Cluster")
    result = operation.result_class(particles_uri="file:///p", largest_uris=["a", "b"], sizes=[2**40, 1])
    assert result_from_mapping(operation, result_to_mapping(result)) == result
    assert result_to_mapping(result)["sizes"] == [2**40, 1]
