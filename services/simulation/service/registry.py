"""Where the simulation service's operations register."""

from cryofleet.server import Service
from cryofleet.v1 import simulation_pb2

service = Service(simulation_pb2.DESCRIPTOR.services_by_name["SimulationService"])
