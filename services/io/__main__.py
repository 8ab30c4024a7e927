"""`python -m services.io`: an instance of the io service."""

from cryofleet.server import main
from services.io.service import service

main(service)
