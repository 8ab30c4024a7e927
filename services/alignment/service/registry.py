"""Where the alignment service's operations register."""

from cryofleet.server import Service
from cryofleet.v1 import alignment_pb2

service = Service(alignment_pb2.DESCRIPTOR.services_by_name["AlignmentService"])
