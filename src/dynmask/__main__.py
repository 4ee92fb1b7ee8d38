"""``python -m dynmask``: the same as the ``dynmask`` command."""

import sys

from .cli import main

sys.exit(main())
