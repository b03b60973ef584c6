"""`python -m benchmarks` in a checkout: what `sfm-fast bench` is where the package is installed."""

import sys

from .command import main

sys.exit(main())
