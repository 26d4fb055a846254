"""HTML of the report: tables, figures and notes. Every string from a file is escaped (Jinja autoescape)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
from markupsafe import Markup

from harness.report.compare import bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

_TABLE = _ENVIRONMENT.from_string("""\
<div class="scroll" tabindex="0" role="region" aria-label="table: {{ caption }}"><table>
<caption><div>{{ caption }}{% if note %} <small>{{ note }}</small>{% endif %}</div></caption>
<thead><tr>
{% for c in columns %}
<th scope="col" class="{{ c.kind }}"{% if c.help %} title="{{ c.help }}"{% endif %}>{{ c.title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row.first %} class="first"{% endif %}>
{% for cell in row.cells %}
<td class="{{ cell[1] }}">{{ cell[0] }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
""")

_FIGURE = _ENVIRONMENT.from_string("""\
<figure><div class="scroll" tabindex="0" role="region" aria-label="figure: {{ caption }}">
<img alt="{{ alt }}" src="data:image/svg+xml;base64,{{ data }}"></div>
<figcaption>{{ caption }}</figcaption></figure>
""")

_MISSING = _ENVIRONMENT.from_string("""\
<p class="missing">{{ what }}{% if command %} Fill this section with <code>{{ command }}</code>
{%- if hint %}, {{ hint }}{% endif %}.{% endif %}</p>
""")


_FOLDED = _ENVIRONMENT.from_string("""\
<details><summary>{{ summary }}</summary>
{% for part in parts %}
{{ part }}
{% endfor %}
</details>
""")


class Html:
    """Trusted HTML that a notebook shows as it is."""

    def __init__(self, *parts: str):
        self.html = "\n".join(parts)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "(shown as HTML)"


@dataclass(frozen=True)
class Column:
    """A column of a table: the frame's ``key``, its heading, and how a value is shown.

    ``kind``: ``num`` (right-aligned), ``text`` (one line) or ``prose`` (wraps).
    ``merge``: leave a value blank that repeats the row above.
    """

    key: str
    title: str
    show: Callable[[Any], Any] = str
    kind: str = "text"
    help: str = ""
    merge: bool = False


def table(frame: pd.DataFrame, columns: Sequence[Column], caption: str, note: str = "") -> str:
    """``frame`` as an HTML table; ``show`` gives a string (escaped) or ``Markup`` (kept)."""
    rows, above = [], [object()] * len(columns)
    for record in frame.to_dict("records"):
        cells, repeats = [], True
        for i, column in enumerate(columns):
            value = record[column.key]
            repeats = repeats and column.merge and value == above[i]
            cells.append((column.show(value), f"{column.kind} same" if repeats else column.kind))
            above[i] = value
        rows.append({"cells": cells, "first": columns[0].merge and "same" not in cells[0][1]})
    return _TABLE.render(columns=columns, rows=rows, caption=caption, note=note)


def figure(fig: Figure, alt: str, caption: str) -> str:
    """A figure as an inline SVG image with its alternative text."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)
    return _FIGURE.render(alt=alt, caption=caption, data=base64.b64encode(buffer.getvalue()).decode())


def folded(summary: str, *parts: str) -> str:
    """``parts`` behind a line to click."""
    return _FOLDED.render(summary=summary, parts=[Markup(part) for part in parts])


def missing(what: str, command: str, hint: str = "") -> str:
    """Says what a section lacks and the command that fills it."""
    return _MISSING.render(what=what, command=command, hint=hint)


def fill(template: str, **values: Any) -> str:
    """A piece of HTML with escaped values."""
    return _ENVIRONMENT.from_string(template).render(**values)


def badge(level: str) -> Markup:
    """An evidence level, a kind of network or a mark, as a pill that says its word (never colour alone)."""
    kind = (
        level
        if level in ("measured", "emulated", "simulated", "reported")
        else "plain"
        if "network" in level
        else "warn"
    )
    return Markup('<span class="badge {}">{}</span>').format(kind, level)


def ratio(value: float, low: float, high: float) -> Markup:
    """``3.41× [3.30, 3.52]``; coloured only where the interval excludes 1."""
    if not math.isfinite(value):
        return Markup("–")
    kind = "faster" if low > 1 else "slower" if high < 1 else "unshown"
    return Markup('<span class="{}">{}</span> <small>{}</small>').format(kind, f"{value:.2f}×", interval(low, high))


def interval(low: float, high: float) -> str:
    """Of a ratio."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval]"
    return f"[{bound(low)}, {bound(high)}]"


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal with ``digits`` significant digits (1234 → 1230 is never wanted: whole numbers stay whole)."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def milliseconds(value_s: float, low_s: float = math.nan, high_s: float = math.nan) -> Markup:
    """Seconds shown as ms, with the interval where there is one."""
    if not math.isfinite(value_s):
        return Markup("–")
    shown = significant(value_s * 1e3)
    if not math.isfinite(low_s):
        return Markup("{}").format(shown)
    return Markup("{} <small>[{}, {}]</small>").format(shown, significant(low_s * 1e3), significant(high_s * 1e3))


def megabytes(value_bytes: float) -> str:
    return significant(value_bytes / 1e6)


def percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"
