"""The subcommands of `mtp-mem`, a file each: its options and what it does."""
