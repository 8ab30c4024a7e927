"""`python -m services.simulation`: one instance of the service, configured by the environment."""

from cryofleet.server import main
from services.simulation.service import service

main(service)
