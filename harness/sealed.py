"""JSON files with a checksum of their own, so that a damaged one is told and never read as if it were right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def seal(data: Mapping[str, Any], **style: Any) -> str:
    """``data`` as text, with its checksum; ``style``: of ``json.dumps``."""
    plain = json.loads(json.dumps(data, default=str))
    return json.dumps({**plain, KEY: _digest(plain)}, **style)


def unseal(text: str, *, sealed: bool = False) -> dict[str, Any]:
    """What ``seal`` was given. ``ValueError`` for what is no JSON mapping, or not the one that was sealed. ``sealed``:
    also for one without a checksum; else that is one of a user, or of an older moebench."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(data, dict):
        raise ValueError(f"holds a {type(data).__name__} where a mapping should be")
    if KEY in data:
        digest = data.pop(KEY)
        if digest != _digest(data):
            raise ValueError(f"its contents are not those of its {KEY}; leave that out if they were changed by hand")
    elif sealed:
        raise ValueError(f"has no {KEY}")
    return data


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
