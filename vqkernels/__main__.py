"""`python -m vqkernels`."""

import sys

from vqkernels.cli import main

sys.exit(main())
