"""URLs of stores: the part that names a place, and the options after the question mark."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import parse_qsl, urlsplit

from router_replay.errors import InputError

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def split_url(url: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """A store's URL without its options, and its options.

    Args:
        known: the options that this store has.

    Raises:
        InputError: an option that it does not have, or twice; a password, which would be in logs and in handles.
    """
    place, _, query = url.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs) or not set(options) <= set(known):
        # Values are not repeated: what is not an option may be a secret.
        raise InputError(
            f"store URL {place!r} with the options {', '.join(name for name, _ in pairs)}: it takes"
            f" {', '.join(sorted(known)) or 'none'}, each once. Credentials come from the environment or a"
            " configuration file, never from the URL"
        )
    if urlsplit(place).password is not None:
        raise InputError(
            f"the URL of a {place.partition(':')[0]}: store holds a password: URLs travel in answers and stand in logs,"
            " so credentials come from the environment or a configuration file"
        )
    return place, options


def num_bytes(text: str) -> int:
    """The number of bytes that a text like `64GiB`, `500MB` or `1048576` names.

    Raises:
        InputError: another text, or no bytes at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", text)
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found and (found[2] or "") in _UNITS else 0
    if size < 1:
        raise InputError(f"max_bytes is {text!r}, but must be a size above 0, such as 64GiB, 500MB or 1048576")
    return size
