"""How every figure looks: colours, markers, lines to compare with, the roles of units."""

from pathlib import Path

STYLE = Path(__file__).with_name("figures.mplstyle")
PALETTE = (  # seaborn's "colorblind": told apart with any colour vision
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#56b4e9", "#ece133",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d")
METHODS = {"full": 0, "apex": 1, "lora": 2}  # numbers of colours, in all figures alike; others take what is left
LEVEL = {"color": "0.4", "linewidth": 0.8}  # a line across
DOTTED = LEVEL | {"linestyle": ":"}  # that is there to compare with
SLANTED = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # names below an axis
STANDING = {"rotation": 90, "ha": "center", "va": "top"}  # where there are many
UPRIGHT = {"rotation": 90, "ha": "left", "va": "top"}  # the name of a level, beside it
DOTS = {"linestyle": "none", "mec": "white", "mew": 0.4}  # markers that may lie on one another
IMAGE = {"aspect": "auto", "interpolation": "nearest"}  # a cell for each entry of a matrix
ROLES = {  # role of a unit in a plan: its name in a legend, colour
    "source": ("advantageous", PALETTE[3]),
    "target": ("disadvantageous", PALETTE[0]),
    "direct": ("directly tuned", PALETTE[2]),
    "frozen": ("frozen", "0.85"),
}
ORDERS = {  # order of masking: its name in a legend, number of its colour, marker
    "advantageous": ("most active first", 3, "o"),
    "random": ("at random", 7, "s"),
    "disadvantageous": ("least active first", 0, "^"),
}
