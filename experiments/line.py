"""How a thing is drawn and called in every figure."""

from typing import NamedTuple

# Every colour has a marker of its own.
_MARKERS = {
    "black": "o",
    "tab:gray": "s",
    "tab:blue": "^",
    "tab:orange": "D",
    "tab:green": "v",
    "tab:red": "X",
    "tab:purple": "P",
    "tab:brown": "<",
    "tab:pink": ">",
    "tab:olive": "*",
    "tab:cyan": "h",
    "goldenrod": "d",
}


class Line(NamedTuple):
    """One entry of a legend. Line styles and markers differ too, so that figures can be read without colours."""

    label: str
    color: str
    style: str = "-"
    marker: str = ""  # where it is empty, that of the colour

    @property
    def shape(self) -> str:
        """The marker that is drawn."""
        return self.marker or _MARKERS.get(self.color, ".")
