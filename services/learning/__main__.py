"""`python -m services.learning`: an instance of the learning service."""

from cryofleet.server import main
from services.learning.service import service

main(service)
