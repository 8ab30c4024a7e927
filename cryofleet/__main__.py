"""`python -m cryofleet` is the command line."""

from cryofleet.cli import main

main()
