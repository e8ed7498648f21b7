"""`python -m server.cli` is `lorikeet`."""

import sys

from server.cli import main

sys.exit(main())
