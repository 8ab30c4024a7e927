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
from cryofleet.v1 import picking_pb2, simulation_pb2


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
    request = simulation_pb2.SimulateTomogramRequest()
    request.structures.add(name="double-ring", count=2)
    request.structures.add(name="mine", count=1, source_uri="file:///x.pdb")
    assert inputs_of(request) == {"structures.source_uri": ["", "file:///x.pdb"]}
    assert [s["name"] for s in parameters_of(request)["structures"]] == ["double-ring", "mine"]


def test_a_request_from_text_as_a_command_line_has_it() -> None:
    operation = find_operation("simulation.SimulateTomogram")
    mapping = {"size_x": "64", "snr": "0.1", "contrast": "light", "structures": [{"name": "barrel", "count": 3}]}
    request = request_from_mapping(operation, mapping)
    assert isinstance(request, simulation_pb2.SimulateTomogramRequest)
    assert (request.size_x, request.snr, request.contrast) == (64, 0.1, 2)
    assert request.structures[0].count == 3


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"size": 3}, r"no parameter 'size'; did you mean 'size_[xyz]'"),
        ({"size_x": 2.5}, "must be a whole number"),
        ({"size_x": True}, "must be a whole number"),
        ({"size_x": 2**40}, "at most 31 bits"),
        ({"snr": "loud"}, "snr is 'loud'; it must be a number"),
        ({"contrast": "grey"}, "must be one of dark, light"),
        ({"structures": {"name": "a"}}, "must be a list"),
        ({"structures": [{"nam": "a"}]}, r"no parameter 'structures\[0\]\.nam'; did you mean 'name'"),
        ({"context": {}}, "no parameter 'context'"),
    ],
)
def test_wrong_fields_are_named(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        request_from_mapping(find_operation("simulation.SimulateTomogram"), mapping)


def test_results_go_through_json_and_back() -> None:
    operation = find_operation("learning.Cluster")
    result = operation.result_class(particles_uri="file:///p", largest_uris=["a", "b"], sizes=[2**40, 1])
    assert result_from_mapping(operation, result_to_mapping(result)) == result
    assert result_to_mapping(result)["sizes"] == [2**40, 1]
