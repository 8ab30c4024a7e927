"""`python -m cryofleet.server`: an instance with no service of its own, for checking an installation."""

from cryofleet.server import main
from cryofleet.server.runtime_service import service

main(service)
