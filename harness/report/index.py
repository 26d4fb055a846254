"""One page that lists every report there is."""

from __future__ import annotations

import json
import time
from pathlib import Path

from harness import outputs
from harness.report import page
from harness.report.keep import PAGE

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="generator" content="moebench">
<title>moebench: reports</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}div{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left}</style>
<h1>Reports</h1><div tabindex="0" role="region" aria-label="reports"><table>
<tr><th>report</th><th>over</th><th>made</th><th>tables</th></tr>
{% for r in reports %}<tr><td><a href="{{ r.link }}">{{ r.name }}</a></td><td>{{ r.over }}</td><td>{{ r.made }}</td>
<td><a href="{{ r.tables }}">{{ r.num_tables }}</a></td></tr>{% endfor %}</table></div></html>
"""


def write(results: Path) -> Path:
    """List the pages in ``results``/report and ``results``/runs/*/report, latest first, in ``results``/index.html;
    ``UserError`` where that is there and somebody else's."""
    index = results / "index.html"
    outputs.check(index, "list of reports", PAGE)
    found = [*results.glob("report/*.html"), *results.glob("runs/*/report/*.html")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    reports = []
    for path in found:
        tables = path.parent / "tables" / path.stem  # a paper's; those of a run lie together
        tables = tables if tables.is_dir() else tables.parent
        counts = {kind: len(list(tables.glob(f"*.{kind}"))) for kind in ("csv", "tex")}
        reports.append(
            {
                "link": path.relative_to(results).as_posix(),
                "name": path.stem,
                "over": _runs_of(path.with_suffix(".ipynb")),
                "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
                "tables": tables.relative_to(results).as_posix(),
                "num_tables": f"{counts['csv']} CSV, {counts['tex']} LaTeX",
            }
        )
    outputs.write(index, page.fill(_PAGE, reports=reports), "list of reports")
    return index


def _runs_of(executed: Path) -> str:
    """What a notebook was executed over, as papermill has written it down."""
    try:
        parameters = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]["parameters"]
    except (OSError, ValueError, KeyError):
        return "unknown: its notebook is gone"
    runs = [Path(parameters[key]).name for key in ("run_dir", "other") if parameters.get(key)]
    return f"run {' and '.join(runs)}" if runs else "no run"
