"""A notebook, and a run's folder -> the executed notebook and one self-contained HTML page.

A notebook reports on a run, and its page lies beside it. One of a paper has a page of its own: it says in its metadata
(``moebench: {suite: NAME}``) which suite's run it shows where that run is there, and does without where it is not; or
which study it is about (``moebench: {study: NAME}``).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import outputs
from harness.errors import Failure, UserError, bad
from harness.launch import scratch
from harness.report.keep import PAGE
from harness.report.run import known_runs, load

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
TEMPLATES = Path(__file__).resolve().parent / "template"
START_TIMEOUT_S = 600  # of the kernel; a cell has no limit, since a busy machine may take any time

Progress = Callable[[str], None]


def render(
    name: str,
    run_dir: Path | None,
    *,
    out: Path | None = None,
    parameters: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Execute ``notebooks/NAME.ipynb`` over ``run_dir`` and return the path of ``out``/NAME.html; NAME-OTHER.html where
    a parameter ``other`` names a second run.

    ``run_dir``: None for a notebook whose run is not there and not needed. ``out``: by default
    ``run_dir``/report, or results/report of the repository for a paper's page.
    ``parameters`` go into the notebook's ``parameters`` cell (``baseline``, ``control``); ``progress`` hears one
    line per stage. The executed notebook lands beside the page, the tables as CSV in ``out``/tables.
    ``UserError``: no such notebook, parameter or run, a run without rows, a report folder that cannot be written.
    """
    import papermill

    say = progress or (lambda line: None)
    notebook = _notebook(name)
    known = papermill.inspect_notebook(str(notebook))
    if unknown := set(parameters or {}) - set(known):
        raise bad("notebook parameter", sorted(unknown)[0], f"unknown; {name} takes {', '.join(known)}")
    if run_dir is not None:
        run_dir = Path(run_dir).resolve()
        given = {key: str(value) for key, value in (parameters or {}).items() if key in ("baseline", "control")}
        load(run_dir, **given)  # type: ignore[arg-type]  # before a kernel starts: a user's error costs no time
    elif suite(name) is None:
        raise bad("run", None, f"{name} reports on a run; make one with moebench run --suite quick")
    if out is None:
        out = run_dir / "report" if run_dir is not None and suite(name) is None else ROOT / "results" / "report"
    out = out.resolve()
    other = Path(str((parameters or {}).get("other", ""))).name
    stem = f"{name}-{other}" if other else name
    outputs.check(out / f"{stem}.html", "report", PAGE)
    outputs.check(out / f"{stem}.ipynb", "report", lambda path: b'"papermill"' in path.read_bytes())
    page, executed = out / f"{stem}.html", out / f"{stem}.ipynb"
    with _written_to(out):
        out.mkdir(exist_ok=True, parents=run_dir is None or out.parent != run_dir)
        part = out / f"{stem}.part.ipynb"  # until it is whole: a page keeps the notebook that it was made from
        part.touch()
        say(f"executing {notebook.name}")
        folders = {"run_dir": str(run_dir or ""), "out_dir": str(out)}
        _execute(notebook, part, {**(parameters or {}), **{key: folders[key] for key in folders if key in known}})
        part.replace(executed)
        say("writing HTML")
        title = f"moebench: {name if suite(name) or not run_dir else run_dir.name}"
        outputs.write(page, to_html(executed, title), "report")
    return page


@contextlib.contextmanager
def _written_to(out: Path) -> Iterator[None]:
    """What cannot be written to ``out`` is a user's error, and no part of it stays."""
    try:
        yield
    except OSError as error:
        for part in out.glob("*.part.ipynb") if out.is_dir() else ():
            part.unlink(missing_ok=True)
        remedy = f"cannot be written ({error.strerror or error}); free space or fix permissions"
        raise bad("report folder", str(out), remedy) from None


def _execute(notebook: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Into ``target``, in its folder. ``UserError``: one that was raised in the notebook; ``target`` is gone then.
    ``Failure``: its process was killed."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    with scratch.folder("kernel") as folder, _own_kernel(folder):
        try:
            papermill.execute_notebook(
                str(notebook),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                start_timeout=START_TIMEOUT_S,
                cwd=str(target.parent),
            )
        except PapermillExecutionError as error:
            if error.ename != UserError.__name__:
                raise  # a fault of ours: its traceback stands in the notebook, which stays
            target.unlink()
            raise UserError(error.evalue) from None
        except DeadKernelError:
            target.unlink()
            raise Failure(
                f"the process that executes {notebook.name} was killed, as where memory runs out; free some, and repeat"
            ) from None


def to_html(executed: Path, title: str) -> str:
    """An executed notebook as one HTML document that loads nothing from anywhere."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(executed, as_version=4)
    sections = [
        cell.source.splitlines()[0].removeprefix("## ")
        for cell in notebook.cells
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]
    exporter = HTMLExporter(
        template_name="page",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    code_css = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    page = {"title": title, "sections": sections, "code_css": code_css}
    html, _ = exporter.from_notebook_node(notebook, resources={"page": page})
    return html


def notebooks() -> list[str]:
    """Names that ``render`` knows."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def suite(name: str) -> str | None:
    """The suite whose run notebook ``name`` shows but does not need, or the study that it is about where it shows no
    run; None where it is about a run of any suite."""
    metadata = json.loads(_notebook(name).read_text(encoding="utf-8"))["metadata"].get("moebench", {})
    found = metadata.get("suite") or metadata.get("study")
    return str(found) if found else None


def _notebook(name: str) -> Path:
    known = notebooks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise bad("notebook", name, f"{hint}known notebooks: {', '.join(known) or 'none'}")
    return NOTEBOOKS / f"{name}.ipynb"


@contextlib.contextmanager
def _own_kernel(where: Path) -> Iterator[None]:
    """Make ``python3`` mean this interpreter, whatever kernels the machine has or lacks, and keep Jupyter's and
    IPython's files out of the home folder."""
    folder = where / "kernels" / "python3"
    folder.mkdir(parents=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"],
        "display_name": "Python 3",
        "language": "python",
        "env": {"PYTHONPATH": path},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    wanted = {
        "JUPYTER_PATH": os.pathsep.join(filter(None, [str(where), os.environ.get("JUPYTER_PATH", "")])),
        "JUPYTER_RUNTIME_DIR": str(where / "runtime"),
        "IPYTHONDIR": str(where / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


__all__ = ["UserError", "known_runs", "render", "suite", "to_html"]
