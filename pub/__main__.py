"""`python -m tokencore` is the `tokencore` command."""

import sys

from tokencore.cli import main

sys.exit(main())
