"""`python -m regrow`: the command line."""

from regrow.app.cli import main

main()
