"""`python -m services.viewer`: an instance of the viewer."""

from cryofleet.server import main
from services.viewer.service import service

main(service)
