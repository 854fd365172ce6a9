"""The built-in strategies, one file each; a file reads as its algorithm from top to bottom."""

if __name__ != "mtp_mem.strategies":
    # Imported twice under two names, one file would give two classes that are not equal.
    raise ImportError(f"import this package as mtp_mem.strategies, not as {__name__!r}: pip install -e .")
