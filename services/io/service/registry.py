"""Where the io service's operations register."""

from cryofleet.server import Service
from cryofleet.v1 import io_pb2

service = Service(io_pb2.DESCRIPTOR.services_by_name["IoService"])
