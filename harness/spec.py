"""The base of all specs: frozen, validated, hashable."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from harness.fields import first_wrong

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]
PROSE = ("source", "interpretation")  # rewording a note makes no other experiment
UNNAMED = "inline"  # the name, in digests, of what has none in its file


def content_hash(fields: dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON, without the notes, of names as ``hashed_name`` says."""

    def canonical(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {k: canonical(v) for k, v in value.items() if k not in (*PROSE, "hashed_name")}
        return kept | ({"name": value["hashed_name"]} if value.get("hashed_name") else {})

    text = json.dumps(canonical(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Spec(BaseModel):
    """Base of all specs: immutable, no unknown fields, hash of the resolved content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    #: fields that came later: while they have their default they are not written, so that a digest stays what it was
    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = written(self)
        for name in self.LATER:
            if name in found and (found[name] == {} or getattr(self, name) == type(self).model_fields[name].default):
                del found[name]
        return found

    def __hash__(self) -> int:
        return hash(self.digest)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which would hand the cached hash on to a copy that is another experiment."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("digest", None)
        return copied

    @functools.cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON, without ``source`` and ``interpretation``."""
        return content_hash(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: Any, where: str) -> Any:
        """Validate ``data``; raise one ``UserError`` naming the first bad field under ``where``."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            place = error.errors()[0]["loc"][:-1]
            raise first_wrong(error, where, cls._at(place).model_fields) from None

    @classmethod
    def _at(cls, place: tuple[int | str, ...]) -> type[Spec]:
        """The spec that stands at ``place`` inside of this one."""
        found: type[Spec] = cls
        for part in place:
            if isinstance(part, str) and part in found.model_fields:
                found = next(_specs_in(found.model_fields[part].annotation), found)
        return found


class Named(Spec):
    """A spec with a name, that of a preset or its file's. ``hashed_name``: what digests say instead, where the file
    gives none."""

    name: Name
    hashed_name: Annotated[str, Field(repr=False)] = ""

    LATER: ClassVar[tuple[str, ...]] = ("hashed_name",)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Another name is another one in digests, too."""
        given = dict(update or {})
        if "name" in given and self.hashed_name:
            given.setdefault("hashed_name", given["name"].replace(self.name, self.hashed_name))
        return super().model_copy(update=given, deep=deep)


def _specs_in(annotation: Any) -> Iterator[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for inner in get_args(annotation):
        yield from _specs_in(inner)
