"""`python -m orchestrator`: one orchestrator, until SIGTERM."""

from cryofleet.server import main
from orchestrator.service import service

main(service)
