"""`python -m services.alignment`: an instance of the alignment service."""

from cryofleet.server import main
from services.alignment.service import service

if __name__ == "__main__":
    main(service)
