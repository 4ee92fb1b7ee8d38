"""``python -m dynmask.cli``: the same as the ``dynmask`` command."""

import sys

from . import main

sys.exit(main())
