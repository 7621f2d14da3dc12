"""The name and version of a protocol, which stand beside every number."""

from __future__ import annotations


class Versioned:
    """Has a name, and a version that changes with any detail of the definition."""

    name: str
    version: int

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"
