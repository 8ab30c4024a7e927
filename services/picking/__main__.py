"""`python -m services.picking`: an instance of the picking service."""

from cryofleet.server import main
from services.picking.service import service

main(service)
