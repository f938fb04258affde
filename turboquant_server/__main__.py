"""``python -m turboquant_server`` is the same as ``turboquant-server``."""

import sys

from turboquant_server.cli import main

sys.exit(main())
