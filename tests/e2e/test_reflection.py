"""A client that knows nothing but an address can call every service, by reflection alone."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.platform import Platform


class Stranger:
    """Finds services, methods and messages by reflection; imports nothing of Cryofleet's."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.default_authority", "localhost")])
        database = ProtoReflectionDescriptorDatabase(self._channel)
        self.services = [name for name in database.get_services() if not name.startswith("grpc.")]
        self._pool = DescriptorPool(database)

    def methods(self, service: str) -> list[MethodDescriptor]:
        return list(self._pool.FindServiceByName(service).methods)

    def call(self, service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """All events that the method answers `request` with."""
        found = self._pool.FindServiceByName(service).methods_by_name[method]
        message = json_format.ParseDict(request, GetMessageClass(found.input_type)())
        kind: Any = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        call = kind(
            f"/{service}/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        answer = call(message)
        events: list[Message] = list(answer) if found.server_streaming else [answer]
        return [json_format.MessageToDict(event, preserving_proto_field_name=True) for event in events]


def _addresses(platform: Platform) -> dict[str, str]:
    return {**platform.settings.pools, "orchestrator": platform.settings.orchestrator}


@pytest.mark.parametrize("name", ["io", "picking", "alignment", "learning", "simulation", "orchestrator"])
def test_every_service_describes_itself(platform: Platform, name: str) -> None:
    stranger = Stranger(_addresses(platform)[name])
    own = f"cryofleet.v1.{name.capitalize()}Service"
    assert own in stranger.services
    assert stranger.methods(own)
    capacity = stranger.call("cryofleet.v1.RuntimeService", "GetCapacity", {})[0]
    assert capacity["service"] == name


def test_a_stranger_does_the_main_job_by_hand(platform: Platform) -> None:
    """One real method of each service, each on what the one before gave."""
    address = _addresses(platform)

    def result(service: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
        events = Stranger(address[service]).call(f"cryofleet.v1.{service.capitalize()}Service", method, request)
        assert next(iter(events[-1])) == "result", json.dumps(events[-1])
        return dict(events[-1]["result"])

    scene = result(
        "simulation",
        "SimulateScene",
        {
            "size_x": 64, "size_y": 64, "size_z": 32, "voxel_size_angstrom": 15,
            "structures": [{"name": "double-ring", "count": 6}],
        },
    )  # fmt: skip
    series = result("simulation", "SimulateTiltSeries", {"density_uri": scene["density_uri"], "snr": 1})
    tomogram = result(
        "simulation",
        "Reconstruct",
        {"tilt_series_uri": series["tilt_series_uri"], "tilts_uri": series["tilts_uri"], "size_z": 32},
    )
    smooth = result("io", "Filter", {"volume_uri": tomogram["tomogram_uri"], "sigma_angstrom": 20})
    picks = result(
        "picking",
        "DifferenceOfGaussians",
        {"tomogram_uri": smooth["volume_uri"], "particle_diameter_angstrom": 150},
    )
    assert int(picks["count"]) > 0
    boxes = result(
        "picking",
        "Extract",
        {
            "tomogram_uri": tomogram["tomogram_uri"], "particles_uri": scene["truth_uri"], "box_size_voxels": 16,
            "edges": "EDGE_POLICY_FILL_MEAN",
        },
    )  # fmt: skip
    model = result("learning", "TrainAutoencoder", {"subtomograms_uri": boxes["subtomograms_uri"], "max_epochs": 1})
    clusters = result(
        "learning",
        "Cluster",
        {"subtomograms_uri": boxes["subtomograms_uri"], "model_uri": model["model_uri"], "clusters": 2},
    )
    assert [int(size) for size in clusters["sizes"]] == sorted(map(int, clusters["sizes"]), reverse=True)
    average = result(
        "alignment", "Average", {"subtomograms_uri": boxes["subtomograms_uri"], "iterations": 1, "symmetry": "C7"}
    )
    assert average["average_uri"].endswith(".mrc")


def test_a_stranger_sees_what_is_wrong(platform: Platform) -> None:
    stranger = Stranger(platform.settings.pools["picking"])
    with pytest.raises(grpc.RpcError) as caught:
        stranger.call("cryofleet.v1.PickingService", "DifferenceOfGaussians", {"tomogram_uri": "file:///x"})
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "particle_diameter_angstrom" in str(caught.value.details())
