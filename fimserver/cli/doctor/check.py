"""Define the result of a check of ``fimserver doctor``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check: its name, what was found, and how to fix it, or "" if it is good.

    ``is_known`` is false if nothing was found that shows whether it is good.
    """

    name: str
    found: str
    remedy: str = ""
    is_known: bool = True
