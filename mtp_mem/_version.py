"""The version of mtp_mem; it stands nowhere else."""

__version__ = "0.1.0"
