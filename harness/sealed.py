"""JSON files, and lines of them, with a checksum of their own, so that a damaged one, or one of another kind, is told
and never read as if it were right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY, KIND = "sha256", "kind_of_file"


def seal(data: Mapping[str, Any], kind: str, **style: Any) -> str:
    """``data`` as text, with its kind and its checksum; ``style``: of ``json.dumps``."""
    plain = {**json.loads(json.dumps(data, default=str)), KIND: kind}
    return json.dumps({**plain, KEY: digest(plain)}, **style)


def unseal(text: str, kind: str) -> dict[str, Any]:
    """What ``seal`` was given. ``ValueError`` for what is no JSON mapping, not the one that was sealed, or not of that
    kind. One without a checksum is a user's, or of an older moebench, and is given as it is."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(data, dict) or not data:
        raise ValueError("holds no mapping")
    if KEY not in data:
        if KIND in data:
            raise ValueError(f"has no {KEY}")
        return data
    told = data.pop(KEY)
    if told != digest(data):
        raise ValueError(f"its contents are not those of its {KEY}; leave out {KEY} and {KIND} if you changed them")
    if data.pop(KIND, None) != kind:
        raise ValueError(f"is no {kind}")
    return data


def line(data: Mapping[str, Any]) -> str:
    """``data`` as one line of a file of such lines, with its checksum."""
    return seal(data, "line") + "\n"


def unline(text: str) -> dict[str, Any]:
    """What ``line`` was given; ``ValueError`` as of ``unseal``."""
    return unseal(text, "line")


def digest(plain: dict[str, Any]) -> str:
    """Of what JSON holds, however it is laid out."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
