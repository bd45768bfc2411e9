"""Views for JupyterLab and VS Code: what moves on the screen, over a model, tables or folders.

Each displays itself, follows its controls, computes nothing twice, and gives back what was found: `table` or `plan`.
They need the extra `notebooks`.
"""

from apexlib.explore.atlas import Units
from apexlib.explore.expanded import Expansion
from apexlib.explore.masked_text import Masks
from apexlib.explore.records import Runs
from apexlib.explore.spectra import Spectrum

masks, units, expansion, runs, spectrum = Masks, Units, Expansion, Runs, Spectrum


def __dir__() -> list[str]:
    return ["expansion", "masks", "runs", "spectrum", "units"]
