"""The summary page of synthetic and of poor runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

from harness.errors import UserError
from harness.report import compare, figures, page, render, summary, words
from harness.report.render import NOTEBOOKS, to_html
from harness.report.run import load
from tests.report.synthetic_run import RunMaker, fill

SECTIONS = [
    summary.headline, summary.where, summary.routing, summary.speedups, summary.traffic, summary.light, summary.skew,
    summary.drift, summary.training, summary.memory, summary.setbacks, summary.provenance,
]  # fmt: skip


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """One run with everything in it, rendered once through papermill."""
    maker = RunMaker(tmp_path_factory.mktemp("runs") / "demo")
    fill(maker)
    return render("summary", maker.path)


def test_page_is_complete_and_loads_nothing(full_page: Path):
    html = full_page.read_text()
    assert full_page == full_page.parents[1] / "report" / "summary.html"
    for title in re.findall(r"## ([^\n]+)", "\n".join(_sources(NOTEBOOKS / "summary.ipynb"))):
        anchor = title.replace(" ", "-")
        assert f'id="{anchor}"' in html
        assert f'href="#{anchor}"' in html
    loads = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", html)
    assert [x for x in loads if not x.startswith(("#", "data:"))] == []
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert "Traceback (most" not in html
    assert 'class="stderr"' not in html


def test_strings_of_files_are_escaped(full_page: Path):
    html = full_page.read_text()
    assert "<script" not in html.lower()
    assert "&lt;script&gt;alert(" in html


def test_figures_have_alternative_text(full_page: Path):
    images = re.findall(r"<img ([^>]*)>", full_page.read_text())
    assert len(images) >= 5
    assert all(len(re.search(r'alt="([^"]*)"', image)[1]) > 40 for image in images)  # type: ignore[index]


def test_executed_notebook_and_tables_lie_beside_the_run(full_page: Path):
    executed = nbformat.read(full_page.with_suffix(".ipynb"), as_version=4)
    injected = next(cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert json.dumps(str(full_page.parents[1])) in injected.source
    table = pd.read_csv(full_page.parent / "tables" / "speedups_megatron.csv")
    row = table.query("label == 'hiermoe-hd2' and direction == 'total' and cluster == 'emulated-2x4'").iloc[0]
    assert row["low"] < 1.6 / 0.37 < row["high"]
    assert row["evidence"] == "emulated"


def test_committed_notebook_is_parameterised_thin_and_without_outputs():
    notebook = nbformat.read(NOTEBOOKS / "summary.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in code) <= 5


def test_headline_never_claims_what_the_interval_does_not_show(maker, make_experiment):
    maker.timed(make_experiment("megatron"), 1.0, noise=0.2)
    maker.timed(make_experiment("flat"), 0.98, noise=0.2)
    maker.timed(make_experiment("megatron", "zipf-2"), 1.0)
    maker.timed(make_experiment("flat", "zipf-2"), 0.5)
    (finding,) = words.findings(load(maker.path))
    text = " ".join(finding.sentences)
    assert not finding.sure
    assert "on balanced-2048, but no difference from" in text
    assert re.search(r"flat is the fastest of 2 systems on zipf-2: (1\.9|2\.0)", text)
    assert "no difference shown on 1 of 2" in text


def test_baseline_that_was_refused_is_explained(maker, make_experiment):
    maker.without_time(make_experiment("megatron"), "refused", "no CPU kernels")
    maker.timed(make_experiment("flat"), 1.0)
    maker.timed(make_experiment("hiermoe-hd2"), 0.5)
    run = load(maker.path)
    assert run.baseline == "flat"  # one that ran
    (finding,) = words.findings(run)
    assert "No time: megatron refused on balanced-2048: no CPU kernels." in finding.sentences
    assert "2.0" in finding.sentences[0]
    assert "as fast as flat" in finding.sentences[0]
    (finding,) = words.findings(load(maker.path, baseline="megatron"))
    assert "There is no ratio to megatron, which has no time here." in finding.sentences


def test_times_that_do_not_count_are_left_out(maker, make_experiment):
    maker.timed(make_experiment("megatron"), 1.0)
    maker.timed(make_experiment("flat"), 0.1, status="unphysical", reason="faster than the link")
    maker.timed(make_experiment("hiermoe-hd2"), 0.5, status="cpu_bound", reason="1.9 of 2 cores")
    run = load(maker.path)
    assert set(compare.times(run)["label"]) == {"megatron", "hiermoe-hd2"}
    ratio = compare.speedups(run, "megatron").query("direction == 'total'").iloc[0]
    assert ratio["status"] == "cpu_bound"
    assert set(compare.setbacks(run)["status"]) == {"unphysical", "cpu_bound"}
    assert "faster than the link" in summary.setbacks(run).html


def test_options_and_drops_make_labels_of_their_own(maker, make_experiment):
    maker.timed(make_experiment("tutel", options={"two_dh": True}), 1.0)
    dropping = make_experiment("tutel")
    dropping = dropping.model_copy(update={"model": dropping.model.model_copy(update={"capacity_factor": 1.25})})
    maker.timed(dropping, 1.0)
    maker.timed(make_experiment("tutel"), 1.0)
    maker.write_records()
    run = load(maker.path)
    assert run.labels == ["tutel", "tutel (capacity 1.25)", "tutel (two_dh=True)"]
    assert run.rows["race"].nunique() == 1


def test_baseline_is_found_where_the_whole_race_has_options_or_a_capacity(maker, make_experiment):
    model = make_experiment("flat").model.model_copy(update={"capacity_factor": 2.0})
    for system, seconds in (("hiermoe-hd2", 0.5), ("flat", 0.9), ("megatron", 1.0)):
        maker.timed(make_experiment(system).model_copy(update={"model": model}), seconds)
    maker.write_records()
    run = load(maker.path)
    assert run.labels == ["megatron (capacity 2)", "flat (capacity 2)", "hiermoe-hd2 (capacity 2)"]
    (finding,) = words.findings(run)
    assert "times as fast as megatron (capacity 2) (95 % interval" in finding.sentences[0]
    assert "itself" in summary.speedups(run).html


def test_counted_bytes_of_both_directions_add_up(maker, make_experiment):
    maker.timed(make_experiment("flat"), 1.0, node_bytes=100e6)
    traffic = compare.traffic(load(maker.path)).set_index("direction")
    assert traffic.loc["total", "planned_bytes"] == pytest.approx(100e6)
    assert traffic.loc["total", "counted_bytes"] == pytest.approx(103.1e6)
    assert traffic["quotient"].to_list() == pytest.approx([1.031] * 3)
    assert list(traffic.index) == ["forward", "backward", "total"]


def test_time_beside_its_speed_of_light(maker, make_experiment):
    maker.timed(make_experiment("flat"), 2.0, node_bytes=100e6, noise=1e-9)  # 100 MB over two ports of 50 MB/s: 1 s
    times = compare.times(load(maker.path)).set_index("direction")
    assert times.loc["total", "fraction"] == pytest.approx(0.5)


def test_losses_that_differ_are_shown(maker, make_experiment):
    for system, apart in (("megatron", 0.0), ("flat", 1e-3)):
        train = make_experiment(system, "balanced-512", "local-2", "gpt-tiny-moe", "train_step", dtype="float32")
        maker.trained(train, 0.1, steps=11, apart=apart)
    html = summary.training(load(maker.path)).html
    assert "1.0e-02" in html


def test_memory_is_of_the_rank_that_has_the_most_beside_its_plan(maker, make_experiment):
    train = make_experiment("flat", "balanced-512", "local-2", "gpt-tiny-moe", "train_step", dtype="float32")
    base = maker.base(train, 0) | {"unit": "bytes"}
    for rank, most in ((0, 3e6), (1, 4e6)):
        for metric, part, value in (
            ("memory_bytes", "parameters", 1e6), ("memory_bytes", "peak", most), ("memory_planned_bytes", "peak", 5e6),
        ):  # fmt: skip
            maker.append([{**base, "metric": metric, "level": part, "rank": rank, "value": value}])
    run = load(maker.path)
    frame = compare.memory(run).set_index("part")
    assert frame.loc["peak", ["measured_bytes", "planned_bytes"]].to_list() == [4e6, 5e6]
    assert pd.isna(frame.loc["parameters", "planned_bytes"])
    assert "1.250" in summary.memory(run).html


def test_systems_tell_how_their_experts_computed(maker, make_experiment):
    cell = make_experiment("megatron")
    maker.timed(cell, 1.0, launches=2)
    how = {"metric": "how", "level": "experts", "value": float("nan"), "reason": "sequential, one after another"}
    maker.append({**maker.base(cell, launch), **how} for launch in range(2))
    maker.timed(make_experiment("flat"), 1.0)
    html = summary.where(load(maker.path)).html
    assert html.count("sequential, one after another") == 1
    assert "how its experts computed" in html


def test_run_of_refused_cells_says_what_is_missing_in_every_section(maker, make_experiment):
    maker.without_time(make_experiment("deepspeed"), "refused", "needs CUDA <b>")
    run = load(maker.path)
    pages = {section.__name__: section(run).html for section in SECTIONS}
    commands = [name for name, html in pages.items() if "moebench run" in html]
    assert set(commands) == {section.__name__ for section in SECTIONS} - {"setbacks"}
    assert "needs CUDA &lt;b&gt;" in pages["setbacks"]


def test_damaged_files_are_named(maker, make_experiment):
    maker.timed(make_experiment("flat"), 1.0)
    (maker.path / "rows-9-broken.parquet").write_bytes(b"PAR1 not really")
    (maker.path / "record-broken.json").write_text("{")
    html = summary.setbacks(load(maker.path)).html
    assert "rows-9-broken.parquet" in html
    assert "record-broken.json" in html


def test_mathematics_in_a_name_is_a_name(maker, make_experiment):
    maker.timed(make_experiment("megatron"), 1.0)
    maker.timed(make_experiment("flat", options={"kind": "$\\bad{$ <b>"}), 1.0)
    maker.write_records()
    html = summary.speedups(load(maker.path)).html
    assert "$\\bad{$ &lt;b&gt;" in html


def test_one_sample_has_no_interval(maker, make_experiment):
    maker.timed(make_experiment("megatron"), 1.0, launches=1, reps=1)
    maker.timed(make_experiment("flat"), 0.5, launches=1, reps=1)
    run = load(maker.path)
    assert "no interval" in summary.speedups(run).html
    (finding,) = words.findings(run)
    assert not finding.sure
    assert "is the fastest" not in " ".join(finding.sentences)


def test_every_system_has_its_own_look(full):
    looks = figures.looks(load(full.path).labels).values()
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(looks)
    assert len({look.hatch for look in looks}) == len(looks)


def test_unknown_run_and_notebook_name_the_known_ones(maker, make_experiment, tmp_path):
    maker.timed(make_experiment("flat"), 1.0)
    with pytest.raises(UserError, match=r"known runs: demo") as error:
        render("summary", maker.path.with_name("dmo"))
    assert "\n" not in str(error.value)
    (maker.path.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no rows.*known runs: demo"):
        render("summary", maker.path.parent / "empty")
    with pytest.raises(UserError, match=r"did you mean summary\?"):
        render("sumary", maker.path)
    with pytest.raises(UserError, match="'basline': unknown; summary takes run_dir, baseline, control"):
        render("summary", maker.path, parameters={"basline": "flat"})
    with pytest.raises(UserError, match=r"^baseline: 'nope': is no system of demo; there are flat$") as error:
        render("summary", maker.path, parameters={"baseline": "nope"})
    with pytest.raises(UserError, match=r"^control: 'nope': is no system of demo; there are flat$"):
        render("summary", maker.path, parameters={"control": "nope"})
    with pytest.raises(UserError, match="no run is stored"):
        render("summary", tmp_path / "nowhere" / "demo")


def test_error_in_a_cell_is_shown_escaped(tmp_path):
    """A notebook of somebody's own that fails still becomes a readable page."""
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="<b>", traceback=["\x1b[31m<b>wrong\x1b[0m"])
    cell = nbformat.v4.new_code_cell("1 < 2", outputs=[error])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    html = to_html(tmp_path / "x.ipynb", "a <b> title")
    assert "&lt;b&gt;wrong" in html
    assert "<title>a &lt;b&gt; title</title>" in html


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (1234.5, "1,234"), (float("nan"), "–")]
)
def test_three_significant_digits(value, shown):
    assert page.significant(value) == shown


def test_interval_says_on_which_side_of_one_it_ends():
    assert page.interval(0.961, 0.998) == "[0.96, 0.998]"
    assert "slower" in page.ratio(0.98, 0.961, 0.998)
    assert "unshown" in page.ratio(0.98, 0.961, 1.002)


def _sources(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def test_what_is_wide_scrolls_in_its_own_box_below_a_title_that_stays():
    """So that a page is never wider than a phone."""
    rows = pd.DataFrame({"system": ["flat"]})
    shown = page.table(rows, [page.Column("system", "system")], "a title", "and its note")
    assert re.fullmatch(r'<div class="scroll" .*<caption><div>a title.*</div></caption>.*</div>', shown, re.DOTALL)
    with figures.styled():
        drawn = figures.drawn(lambda: plt.subplots()[0], "alt", "caption")
    assert re.search(r'<figure><div class="scroll" [^>]*>\s*<img [^>]*></div>\s*<figcaption>caption<', drawn)
    style = (Path(page.__file__).parent / "template/page/style.css").read_text()
    rules = {selector.strip(): rule for selector, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style)}
    assert "overflow-x: auto" in rules[".scroll"]
    assert "sticky" in rules["caption div"]
