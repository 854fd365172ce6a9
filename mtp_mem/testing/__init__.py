"""For other people's tests: `check_strategy` runs a strategy through everything `mtp-mem verify` runs."""

from mtp_mem.testing.check import check_strategy

__all__ = ["check_strategy"]
