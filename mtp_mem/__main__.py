"""`python -m mtp_mem` is `mtp-mem`."""

import sys

from mtp_mem.cli import main

sys.exit(main())
