"""What the soak counts."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts of one soak; threads add to it.

    Attributes:
        rows: returned rows by where their KV came from (`answers.ORIGINS`), valid or not.
        invalid: those of them that are not valid.
        wrong: those that are valid and wrong.
        distinct: rows that their own request computed: each a pair of token and forward pass that no other row is.
        near_ties: sets of experts that are not the reference's own, within the bound of rounding.
        closest: the largest such contradiction, as a share of its bound.
        events: answers, aborts, updates and so on, by name.
        faults: what else went wrong, in words; whole contexts of wrong rows among them.
    """

    rows: Counter[str] = field(default_factory=Counter)
    invalid: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    distinct: int = 0
    near_ties: int = 0
    closest: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def happened(self, event: str, times: int = 1) -> None:
        """Count an event."""
        with self._lock:
            self.events[event] += times

    def fault(self, text: str) -> None:
        """Note something that must not be; the first fifty in full."""
        with self._lock:
            self.events["faults"] += 1
            if len(self.faults) < 50:
                self.faults.append(text)

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "rows": {"all": self.rows.total(), **self.rows},
            "distinct (token, forward pass) pairs": self.distinct,
            "wrong rows marked valid": {"all": self.wrong.total(), **self.wrong},
            "invalid rows": {"all": self.invalid.total(), **self.invalid},
            "near ties": {"sets": self.near_ties, "largest, as a share of the bound": round(self.closest, 4)},
            "events": dict(sorted(self.events.items())),
            # Whole contexts, and a handful tells what kind they are of.
            "faults": self.faults[:5],
        }
