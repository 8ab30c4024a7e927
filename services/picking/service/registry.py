"""Where the picking service's operations register."""

from cryofleet.server import Service
from cryofleet.v1 import picking_pb2

service = Service(picking_pb2.DESCRIPTOR.services_by_name["PickingService"])
