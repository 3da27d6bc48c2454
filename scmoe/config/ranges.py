"""The ranges of numbers in a configuration. Their names are what error messages and `--help` show."""

from collections.abc import Callable

# Counts end below 2^31, so that their products fit 64 bits.
RANGES: dict[str, Callable[[float], bool]] = {
    "above 0, at most 1": lambda x: 0 < x <= 1,
    "above 0, at most 1e6": lambda x: 0 < x <= 1e6,
    "0 or more, below 1": lambda x: 0 <= x < 1,
    "1e-16 to 1": lambda x: 1e-16 <= x <= 1,
    "0 to 1": lambda x: 0 <= x <= 1,
    "0 to 64": lambda x: 0 <= x <= 64,
    "0 to 1000": lambda x: 0 <= x <= 1000,
    "0 to 2^31 - 1": lambda x: 0 <= x < 2**31,
    "0 to 2^32 - 1": lambda x: 0 <= x < 2**32,  # what NumPy, and so Lightning, accepts as a seed
    "1 to 1000": lambda x: 1 <= x <= 1000,
    "1 to 64": lambda x: 1 <= x <= 64,
    "1 to 1024": lambda x: 1 <= x <= 1024,
    "1 to 2^14": lambda x: 1 <= x <= 2**14,
    "1 to 2^16": lambda x: 1 <= x <= 2**16,
    "1 to 2^17": lambda x: 1 <= x <= 2**17,
    "1 to 2^24": lambda x: 1 <= x <= 2**24,
    "1 to 2^31 - 1": lambda x: 1 <= x < 2**31,
    "1 to 1e6": lambda x: 1 <= x <= 1e6,
    "10 to 1e6": lambda x: 10 <= x <= 1e6,
}
