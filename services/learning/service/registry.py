"""The learning service's registry of operations."""

from cryofleet.server import Service
from cryofleet.v1 import learning_pb2

service = Service(learning_pb2.DESCRIPTOR.services_by_name["LearningService"])
