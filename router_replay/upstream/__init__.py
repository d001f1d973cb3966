"""The ledger of upstream names: what both ends hook, call, override and read, and how an upstream is held against it.

One ledger, two readers: `installed` reads by import, at a start; `source` reads unpacked wheels of other releases.
"""

from router_replay.upstream.check import Problem, check, message, require
from router_replay.upstream.installed import Installed
from router_replay.upstream.patch import Patch
from router_replay.upstream.reader import Found, Reader
from router_replay.upstream.refusals import Refusal, check_settings, refuse
from router_replay.upstream.seam import At, Attribute, Ledger, Seam
from router_replay.upstream.source import Source

__all__ = [
    "At",
    "Attribute",
    "Found",
    "Installed",
    "Ledger",
    "Patch",
    "Problem",
    "Reader",
    "Refusal",
    "Seam",
    "Source",
    "check",
    "check_settings",
    "message",
    "refuse",
    "require",
]
