"""Where the viewer's methods register."""

from cryofleet.server import Service
from cryofleet.v1 import viewer_pb2

service = Service(viewer_pb2.DESCRIPTOR.services_by_name["ViewerService"])
