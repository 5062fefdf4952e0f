"""`python -m regrow` and the command `regrow`."""

from __future__ import annotations

import sys

try:
    from regrow.app.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"regrow: the command line needs {error.name}: pip install 'regrow[app]'")

if __name__ == "__main__":
    main()
