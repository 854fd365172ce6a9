"""How numbers are shown: integer bytes in data, MiB and GiB (2**20, 2**30) for people."""

KiB, MiB, GiB = 2**10, 2**20, 2**30


def show_bytes(nbytes: int) -> str:
    """Bytes in the unit that suits them, with one decimal, below ten with two."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(nbytes) >= unit:
            value = nbytes / unit
            return f"{value:.{2 if abs(value) < 10 else 1}f} {name}"
    return f"{nbytes} B"
