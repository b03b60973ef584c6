"""`python -m sfm_fast` is `sfm-fast`."""

import sys

from .cli import entry

sys.exit(entry())
