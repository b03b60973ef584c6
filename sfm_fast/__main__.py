"""`python -m sfm_fast` is `sfm-fast`."""

import sys

from .cli.main import main

sys.exit(main())
