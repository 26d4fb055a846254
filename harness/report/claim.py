"""What a paper claims, as it is written down: the statement, what was printed, the rows that test it, the criteria."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.errors import bad
from harness.presets import parse_yaml
from harness.specs import Name, Spec

Text = Annotated[str, Field(min_length=1)]
Where = dict[str, str | int | float | bool | tuple[str, ...]]  # a list: any of them
#: words that speak of more than the subject: what the others do, or all of a kind. Each must be tested as well
STRONG = (
    "alone", "only", "always", "never", "every", "each", "all", "any", "none", "both", "best", "worst", "most", "least",
    "largest", "smallest", "highest", "lowest", "fastest", "slowest", "longest", "shortest",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Value:
    """One number with its 95 % interval (NaN: none, as a model without noise and a single sample have none)."""

    point: float
    low: float = math.nan
    high: float = math.nan

    @property
    def least(self) -> float:
        return self.point if math.isnan(self.low) else self.low

    @property
    def largest(self) -> float:
        return self.point if math.isnan(self.high) else self.high


class Reported(Spec):
    """Names one row of ``results/reported/PAPER.csv``; a key that is not given may have any value there."""

    item: Text
    quantity: Text
    testbed: str | None = None
    model: str | None = None
    system: str | None = None


class Criterion(Spec):
    """What the values found must satisfy. ``within``: of the reported ones, in their unit. ``below``, ``above``: a
    number, or the reported value. Where a value has an interval, all of it must lie below or above."""

    within: float | None = Field(default=None, gt=0)
    below: float | Literal["reported"] | None = None
    above: float | Literal["reported"] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Criterion:
        if self.within is None and self.below is None and self.above is None:
            raise ValueError("needs within, below or above")
        return self

    @property
    def needs_reported(self) -> bool:
        return self.within is not None or "reported" in (self.below, self.above)

    @property
    def words(self) -> str:
        said = {"within": self.within, "below": self.below, "above": self.above}
        return " and ".join(
            f"{side} {limit}" if isinstance(limit, str) else f"{side} {limit:g}"
            for side, limit in said.items()
            if limit is not None
        )

    def met(self, found: Value, reported: float) -> bool:
        limits = {side: reported if (v := getattr(self, side)) == "reported" else v for side in ("below", "above")}
        return (
            (self.within is None or abs(found.point - reported) <= self.within)
            and (limits["below"] is None or found.largest < limits["below"])
            and (limits["above"] is None or found.least > limits["above"])
        )


class Experiments(Spec):
    """The rows that test a claim, and how a value is made of them.

    One of ``study`` (with the name of its ``table``, a raw one or one for reading), ``run`` (a stored run) and
    ``ledger`` (the fits of every calibration). ``where`` selects rows. With ``over`` a value is a ratio of the column:
    rows that ``over`` changes ``where`` to, over those of ``where``, paired by the columns ``pair`` (a run pairs by
    launch and repetition itself). ``per``: the estimator is applied to each group, and the least and the largest of
    them are the values. ``differ``: a value is 1 where two columns differ, else 0.
    """

    study: str = ""
    table: str = ""
    run: str = ""
    ledger: bool = False
    where: Where = {}
    over: Where = {}
    pair: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    column: str = "time_s"
    differ: tuple[str, str] | None = None
    estimator: Literal["mean", "geometric_mean", "least", "largest", "range", "share", "count"] = "mean"

    @model_validator(mode="after")
    def _one_source(self) -> Experiments:
        if (bool(self.study) + bool(self.run) + self.ledger) != 1:
            raise ValueError("give one of study, run and ledger")
        if bool(self.study) != bool(self.table):
            raise ValueError("study and table go together")
        if self.study and self.over and not self.pair:
            raise ValueError("a ratio (over) of a study needs pair: the columns that say which rows belong together")
        if self.estimator == "range" and self.per:
            raise ValueError("per already gives a range; choose another estimator")
        if self.run and not ({"label"} == set(self.where) == set(self.over) and self.estimator == "geometric_mean"):
            raise ValueError("a run is judged by geometric_mean, with where and over of a label")
        return self

    @property
    def num_values(self) -> int:
        return 2 if self.per or self.estimator == "range" else 1

    @property
    def basis(self) -> str:
        """In words."""
        source = f"study {self.study}" if self.study else f"run {self.run}" if self.run else "ledger of calibrations"
        return ", ".join([source, *(f"{key} {_shown(value)}" for key, value in self.where.items())])

    @property
    def method(self) -> str:
        """The estimator in words."""
        each = f"{' ≠ '.join(self.differ)}" if self.differ else self.column
        if self.over:
            each = f"ratio over {', '.join(str(v) for v in self.over.values())}"
        words = f"{self.estimator.replace('_', ' ')} of {each}"
        return f"{words}, least and largest per {', '.join(self.per)}" if self.per else words


def _shown(value: object) -> str:
    return " or ".join(value) if isinstance(value, tuple) else str(value)


class Condition(Spec):
    """What a ``word`` of the statement says beside the value. ``by``: how the claim's own experiments test it; else
    ``experiments`` with what they must have ``met``, without which the claim is not reproduced, nor partly."""

    word: Text
    by: str = ""
    experiments: Experiments | None = None
    met: Criterion | None = None

    @model_validator(mode="after")
    def _tests_something(self) -> Condition:
        if bool(self.by) == bool(self.experiments) or bool(self.experiments) != bool(self.met):
            raise ValueError("give by, or experiments with what is to be met")
        if self.met is not None and self.met.needs_reported:
            raise ValueError("is met by numbers, not by reported ones")
        return self


class Claim(Spec):
    """``statement`` in our words; ``source`` in the paper. ``reproduced`` and ``partly``: criteria, chosen from what
    the paper prints and never from a result; without ``reproduced``, because the printed value is not known here, the
    verdict is at most partly. Without experiments ``not_attempted`` says why. ``conditions``: one for each of the
    ``STRONG`` words of the statement."""

    id: Name
    paper: Name
    statement: Text
    source: Text
    unit: str = "×"
    reported: tuple[Reported, ...] = ()
    experiments: tuple[Experiments, ...] = ()
    reproduced: Criterion | None = None
    partly: Criterion | None = None
    conditions: tuple[Condition, ...] = ()
    not_attempted: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if bool(self.experiments) == bool(self.not_attempted):
            raise ValueError("a claim has experiments, or not_attempted says why; one of them")
        if self.experiments and self.reproduced is None and (self.reported or self.partly is None):
            raise ValueError("has experiments but no criterion reproduced")
        if self.reported and self.reproduced is not None and not self.reproduced.needs_reported:
            raise ValueError("has reported values, and reproduced does not compare with them: it would pass by sign")
        for each in self.experiments:
            needed = any(c.needs_reported for c in (self.reproduced, self.partly) if c is not None)
            if len(self.reported) != each.num_values and (needed or self.reported):
                raise ValueError(f"{len(self.reported)} reported values for {each.num_values} found ({each.basis})")
        return self

    @model_validator(mode="after")
    def _words_are_tested(self) -> Claim:
        tested = [condition.word for condition in self.conditions]
        for word in STRONG:
            if self.experiments and says(self.statement, word) and word not in tested:
                raise ValueError(f"says {word!r}, which no condition tests; add one, or say it without")
        for word in tested:
            if not says(self.statement, word):
                raise ValueError(f"has a condition for {word!r}, which its statement does not say")
        return self


def says(statement: str, word: str) -> bool:
    """Whether ``word`` stands in it by itself (all-to-all does not say all)."""
    return re.search(rf"(?<![\w-]){word}(?![\w-])", statement.lower()) is not None


def read(path: Path | str) -> list[Claim]:
    """Claims of ``path``, a YAML list; ``UserError`` names the claim and the field."""
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise bad("claims file", str(path), f"cannot be read ({error}); give a readable YAML file") from None
    if not isinstance(data, list) or not data:
        raise bad(path.name, type(data).__name__, "must be a list of at least one claim")
    found: dict[str, Claim] = {}
    for place, each in enumerate(data):
        named = each.get("id") if isinstance(each, Mapping) else None
        claim: Claim = Claim.parse(each, f"{path.name}: {named or f'claim {place}'}")
        if claim.id in found:
            raise bad(f"{path.name}: {claim.id}", claim.id, "is there twice; give every claim an id of its own")
        found[claim.id] = claim
    return list(found.values())
