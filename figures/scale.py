"""Units that keep numbers on an axis between 1 and 1,000."""

PREFIXES = {1e-9: "n", 1e-6: "µ", 1e-3: "m", 1.0: "", 1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T"}


def scaled(largest: float, unit: str) -> tuple[float, str]:
    """What to multiply by, and the unit to write, where `largest` is the axis' end.

    scaled(3.1e-5, "s") is (1e6, "µs"); sizes in bytes count in powers of 1,000, and below one as 1.
    """
    fitting = [size for size in PREFIXES if size <= largest and (unit != "B" or size >= 1)]
    size = max(fitting, default=1.0)
    return 1 / size, PREFIXES[size] + unit
