"""What a set of cloud files holds: counts, ranges, duplicates, objects without a file, files that cannot be used."""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointalign.data.reading_pool import Outcome


class Survey:
    """A summary of files that were read.

    Args:
        outcomes: of files read with details.
        num_groups: the least number of points that is of use.
    """

    def __init__(self, outcomes: Sequence[Outcome], num_groups: int):
        self.outcomes, self.num_groups = outcomes, num_groups
        self.read = [outcome for outcome in outcomes if not outcome.error]
        self.missing = [outcome.name for outcome in outcomes if not outcome.path]
        self.unreadable = {outcome.name: outcome.error for outcome in outcomes if outcome.error and outcome.path}
        self.few = {outcome.name: outcome.count for outcome in self.read if (outcome.count or 0) < num_groups}
        groups: dict[str, list[str]] = {}
        for outcome in self.read:
            groups.setdefault(outcome.digest, []).append(outcome.name)
        self.duplicates = [names for names in groups.values() if len(names) > 1]

    @property
    def usable(self) -> bool:
        """Whether there are files, and all can be used for training."""
        return bool(self.outcomes) and not (self.missing or self.unreadable or self.few)

    def summary(self) -> dict[str, Any]:
        """As JSON values: numbers of everything, the names of what needs attention, ranges."""
        return {
            "files": len(self.outcomes) - len(self.missing),
            "formats": dict(Counter(Path(outcome.path).suffix.lower() for outcome in self.outcomes if outcome.path)),
            "read": len(self.read),
            "missing": self.missing,
            "unreadable": self.unreadable,
            "fewer_points_than_needed": {"needed": self.num_groups, "files": self.few},
            "duplicates": self.duplicates,
            "notes": {outcome.name: list(outcome.notes) for outcome in self.read if outcome.notes},
            "ranges": self._ranges(),
        }

    def _ranges(self) -> dict[str, dict[str, float]]:
        if not self.read:
            return {}
        sides = [[high - low for low, high in zip(row.low, row.high, strict=True)] for row in self.read]
        values = {
            "points": [row.count or 0 for row in self.read],
            "colours": [row.colours for row in self.read],
            "coordinates": [value for row in self.read for value in (*row.low, *row.high)],
            "longest side": [max(each) for each in sides],
            "shortest side": [min(each) for each in sides],
        }
        return {
            name: {"least": min(row), "median": statistics.median(row), "most": max(row)}
            for name, row in values.items()
        }

    def table(self) -> str:
        """For people: numbers, then ranges."""
        found = self.summary()
        numbers = {
            "files": found["files"],
            "read": found["read"],
            "unreadable": len(self.unreadable),
            f"fewer than {self.num_groups} points": len(self.few),
            "groups of equal clouds": len(self.duplicates),
            "objects without a file": len(self.missing),
            "files with something left out": len(found["notes"]),
        }
        lines = [f"{name:32}{number:>12}" for name, number in numbers.items()]
        lines.append(f"\n{'':32}{'least':>12}{'median':>12}{'most':>12}")
        for name, row in found["ranges"].items():
            lines.append(f"{name:32}" + "".join(f"{row[key]:>12.5g}" for key in ("least", "median", "most")))
        for names in self.duplicates[:5]:
            lines.append(f"equal: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        return "\n".join(lines)
