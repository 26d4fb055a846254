"""How near data-sheet devices come to what others measured in public (``harness/presets/points.yaml``).

``python -m harness.plan.points`` predicts every point of an H100 or H200 by the curve fitted to all other points of
both, and those of other devices by the curve fitted to all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from harness.plan.cost import Compute, Experts
from harness.plan.device import Curve, Tiled
from harness.presets.this_machine import data_sheets

FITTED = ("H100-SXM", "H200-SXM")
ELEMENT_BYTES = {"bfloat16": 2, "float8": 1}
BOUNDS = ((0.2, 0.0, 0.3, 0.0), (1.0, 3000.0, 1.0, 60e-6))  # of the curve's numbers
START = (0.7, 300.0, 0.8, 3e-6)
ROBUST = 0.15  # errors beyond it count less


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """``more``: holds more than products, or is not beyond doubt; not fitted to."""

    device: str
    dtype: str
    cost: Compute
    seconds: float
    source: str
    more: bool

    @property
    def tflops(self) -> float:
        return float(2 * self.cost.macs / self.seconds / 1e12)

    @property
    def fitted(self) -> bool:
        return self.device in FITTED and not self.more

    def predicted_s(self, curve: Curve) -> float:
        sheet = data_sheets()[self.device]
        assert sheet.flops_per_s is not None
        peak = sheet.flops_per_s * 2 / ELEMENT_BYTES[self.dtype]
        return float(Tiled(peak, sheet.bytes_per_s, curve).seconds(self.cost))


@functools.cache
def points() -> tuple[Point, ...]:
    found = []
    for each in _data()["points"]:
        rows = np.broadcast_to(np.asarray(each["rows"]), each["experts"])
        products = tuple((depth, columns) for depth, columns in each["products"])
        cost = Compute.of(Experts(rows, products, ELEMENT_BYTES[each["dtype"]]))
        seconds = each["ms"] / 1e3 if "ms" in each else 2 * float(cost.macs) / (each["tflops"] * 1e12)
        found.append(Point(each["device"], each["dtype"], cost, seconds, each["source"], each.get("more", False)))
    return tuple(found)


def sources() -> dict[str, str]:
    """Where points come from, by the word that they give."""
    return dict(_data()["sources"])


def _data() -> Any:
    text = importlib.resources.files("harness.presets").joinpath("points.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def fit(known: Sequence[Point], start: Sequence[float] = START) -> Curve:
    """The curve whose relative errors at ``known`` are least, outliers counting less."""
    from scipy.optimize import least_squares  # slow to import

    def errors(numbers: np.ndarray) -> np.ndarray:
        curve = Curve(*map(float, numbers))
        return np.log([point.predicted_s(curve) / point.seconds for point in known])

    found = least_squares(errors, start, bounds=BOUNDS, x_scale=START, loss="soft_l1", f_scale=ROBUST)
    return Curve(*map(float, found.x))


def errors(every: Sequence[Point] | None = None) -> list[float]:
    """Predicted over measured less one, of each point; of those that are fitted to, by the curve of all others."""
    every = points() if every is None else every
    known = [point for point in every if point.fitted]
    of_all = fit(known)
    curves = (
        fit([other for other in known if other is not point], dataclasses.astuple(of_all)) if point.fitted else of_all
        for point in every
    )
    return [point.predicted_s(curve) / point.seconds - 1 for point, curve in zip(every, curves, strict=True)]


def main() -> None:
    curve = fit([point for point in points() if point.fitted])
    print(f"{curve}, of {sum(point.fitted for point in points())} points of {' and '.join(FITTED)}; error: left out")
    for point, error in zip(points(), errors(), strict=True):
        experts = point.cost.experts
        assert experts is not None
        shape = f"{experts.rows.size} x {experts.rows.mean():.0f} rows, {list(map(list, experts.products))}"
        mark = "" if point.fitted else ", not fitted to"
        print(
            f"{point.device:13s} {point.dtype:8s} {shape:45s} {point.seconds * 1e3:9.3f} ms "
            f"{point.tflops:6.0f} TFLOP/s {error:+7.1%}  {point.source}{mark}"
        )
    print("\n".join(f"{name}: {text}" for name, text in sources().items()))


if __name__ == "__main__":
    main()
