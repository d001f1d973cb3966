"""Rollout routing replay (R3) for mixture-of-experts reinforcement learning: what knows no engine.

Packages: `masks` (what rollout and trainer exchange), `replay` (what any trainer's end stands on), `mismatch`
(figures, corrections and losses), `run` (what a trainer writes), `report` (what draws it), `upstream` (the ledger
of the engines' names). Nothing is imported here, so that a process loads only what it uses.
"""

__version__ = "0.1.0"
