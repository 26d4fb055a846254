"""One page that lists every report there is."""

from __future__ import annotations

import time
from pathlib import Path

from harness.report import page

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>moebench: reports</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left}</style>
<h1>Reports</h1><table><tr><th>report</th><th>over</th><th>made</th><th>tables</th></tr>
{% for r in reports %}<tr><td><a href="{{ r.link }}">{{ r.name }}</a></td><td>{{ r.over }}</td><td>{{ r.made }}</td>
<td><a href="{{ r.tables }}">{{ r.num_tables }}</a></td></tr>{% endfor %}</table></html>
"""


def write(results: Path) -> Path:
    """List the pages in ``results``/report and ``results``/runs/*/report, latest first, in ``results``/index.html."""
    found = [*results.glob("report/*.html"), *results.glob("runs/*/report/*.html")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    reports = [
        {
            "link": path.relative_to(results).as_posix(),
            "name": path.stem,
            "over": f"run {path.parents[1].name}" if path.parents[2].name == "runs" else "a paper",
            "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
            "tables": (path.parent / "tables").relative_to(results).as_posix(),
            "num_tables": f"{len(list((path.parent / 'tables').glob('*.csv')))} tables",
        }
        for path in found
    ]
    index = results / "index.html"
    index.write_text(page.fill(_PAGE, reports=reports), encoding="utf-8")
    return index
