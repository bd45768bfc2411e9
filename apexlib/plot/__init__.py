"""Draw the tables of the library: each function takes one, as it was measured or as means with intervals.

It draws on the `ax` given, or in a figure of its own, and returns the `ax`; it writes nothing and leaves the style of
other figures alone. `save_figure` writes the picture, and the table beside it. Needs matplotlib (extra `notebooks`).
"""

from apexlib.plot.tables import *  # noqa: F403
from apexlib.plot.tables import __all__


def __dir__() -> list[str]:
    return __all__
