"""One setting that must change before an engine can start."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One setting that must change.

    Args:
        name: The setting.
        constraint: What it must be, as a clause: "must be 1 with …".
        value: What it is, as shown to the user.
        remedy: What to do, in words that can be typed.
    """

    name: str
    constraint: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} {self.constraint}, got {self.value}; {self.remedy}"
