"""What is wrong with the fields of a spec, told as data errors are told: the field, the value, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from harness.errors import UserError, bad


def first_wrong(error: ValidationError, where: str, known: Mapping[str, FieldInfo]) -> UserError:
    """Of the first bad field under ``where``; ``known``: the fields that may stand beside it."""
    first = error.errors()[0]
    field = ".".join([where, *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), list(known), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return bad(field, first["input"], f"unknown field; {hint}known fields are {', '.join(known)}")
    if first["type"] == "missing":
        needed = [name + _choices(each.annotation) for name, each in known.items() if each.is_required()]
        return bad(field, None, f"is missing; needed are {', '.join(needed)}")
    return bad(field, first.get("input"), first["msg"].removeprefix("Value error, "))


def _choices(annotation: Any) -> str:
    """Of a field that takes one of a few words: these, in brackets."""
    return f" ({', '.join(map(str, get_args(annotation)))})" if get_origin(annotation) is Literal else ""


__all__ = ["first_wrong"]
