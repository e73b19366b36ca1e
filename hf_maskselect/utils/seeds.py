"""Random seeds derived from the purpose they serve."""

from __future__ import annotations

import hashlib


def key_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part, such as (seed, purpose, level, candidate)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
