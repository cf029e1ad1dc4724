"""How a thing is drawn and called in every figure."""

from typing import NamedTuple


class Line(NamedTuple):
    """One entry of a legend. Line styles or markers differ too, so that figures can be read without colours."""

    label: str
    color: str
    style: str = "-"
    marker: str = "."
