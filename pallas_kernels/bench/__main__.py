"""The command `python -m pallas_kernels.bench`."""

import sys

from pallas_kernels.bench.benchmark import main

sys.exit(main())
