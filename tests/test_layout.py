"""Layouts: what cannot be divided so is told on one line; groups and their ranks; one way of writing each."""

from __future__ import annotations

import numpy as np
import pytest

from harness import presets
from harness.bench import suite
from harness.cli.options import fields_of
from harness.errors import UserError
from harness.groups import Groups
from harness.layout import Layout
from harness.placement import Placement
from harness.plan.cost import meeting, scope_of
from harness.routing import Routing
from harness.specs import Experiment
from harness.topology import Topology

SHAPE = (2, 4)
CELL = """
name: layouts
experiments:
  - model: {num_layers: 2, hidden: 32, ffn: 32, num_experts: 8, top_k: 2, num_heads: 4, seq: 8, vocab: 64}
    cluster: local-8
    workload: {tokens_per_rank: 16, generator: uniform}
    system: [flat, hiermoe-hd2]
    phase: layer
"""


def cells(layout: str, text: str = CELL) -> list[Experiment]:
    return suite.parse(f"{text}    layout: {layout}\n", "mine.yaml").experiments


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (
            "{expert_parallel: 3}",
            r"layout.expert_parallel: 3: 3 \(expert\) x 1 \(pipeline\) x 2 \(data\) are not the 8",
        ),
        (
            "{expert_parallel: 4, data_parallel: 4}",
            r"layout.data_parallel: 4: 4 .* give degrees whose product they are",
        ),
        ("{expert_parallel: 16}", r"layout.expert_parallel: 16: 16 .* are not the 8 ranks"),
        ("{expert_parallel: 0}", r"layout.expert_parallel: 0: Input should be greater than or equal to 1"),
        ("{tensor_parallel: 2}", r"layout.tensor_parallel: 2: .* give 1 or 4"),
        ("{pipeline_parallel: 4}", r"layout.pipeline_parallel: 4: are more stages than the model has layers; .* 2"),
        ("{expert_paralel: 4}", r"layout.expert_paralel: 4: unknown field; did you mean 'expert_parallel'\?"),
        ("{zero: 2}", r"layout.zero: 2: Input should be 0 or 1"),
        ("{recompute: some}", r"layout.recompute: 'some': Input should be 'none', 'moe' or 'full'"),
        ("4", r"layout: 4: must be a mapping from field to value"),
    ],
)
def test_what_cannot_be_is_told_on_one_line(layout, line):
    with pytest.raises(UserError, match=rf"^mine.yaml: experiments\[0\]\.?:? ?{line}") as told:
        cells(layout)
    assert "\n" not in str(told.value)


def test_a_degree_outside_of_the_layout_is_told_where_it_belongs():
    with pytest.raises(
        UserError, match=r"expert_parallel: 4: belongs to the layout; write layout: \{expert_parallel: 4\}"
    ):
        suite.parse(f"{CELL}    expert_parallel: 4\n", "mine.yaml")


def test_experts_must_divide_over_a_group():
    text = CELL.replace("num_experts: 8", "num_experts: 12")
    assert cells("{expert_parallel: 4}", text)
    with pytest.raises(UserError, match="num_experts: 12: is not divisible by the 8"):
        cells("{}", text)


def test_unequal_nodes_are_refused():
    with pytest.raises(ValueError, match="leaves a group unequal parts of the 2 x 6 ranks' nodes"):
        Groups.of(Topology((2, 6)), 4)


def test_a_layout_has_one_way_of_being_written():
    plain = cells("{}")[0]
    for same in ("{expert_parallel: 8}", "{data_parallel: 1}", "{expert_placement_order: across_nodes}"):
        assert cells(same)[0].digest == plain.digest, same
    four = cells("{expert_parallel: 4}")[0]
    assert four.digest != plain.digest
    assert four.race == plain.race
    assert cells("{data_parallel: 2}")[0].digest == four.digest
    assert cells("{expert_parallel: 4, expert_placement_order: across_nodes}")[0].digest != four.digest
    assert Experiment.model_validate(four.model_dump(mode="json")) == four
    assert "layout" not in plain.model_dump()


def test_tensor_parallelism_is_that_of_model_parallel_attention():
    (shared, _), (written, _) = cells("{}", f"{CELL}    model_parallel: true\n"), cells("{tensor_parallel: 4}")
    assert written == shared
    assert written.digest == shared.digest
    assert (shared.layout.tensor_parallel, written.model_parallel) == (4, True)


def test_what_is_not_built_is_refused_with_its_reason():
    from harness.bench import dry

    for field, value in {"zero": 1, "micro_batches": 2, "recompute": "moe", "pipeline_parallel": 2}.items():
        (cell, _) = cells(f"{{{field}: {value}}}")
        assert f"layout.{field} = {value} is not built" in (dry.refusal(cell) or "")


def test_the_command_line_takes_the_place_of_the_files_own():
    given = fields_of("expert_parallel=4, expert_placement_order=across_nodes")
    assert given == {"expert_parallel": 4, "expert_placement_order": "across_nodes"}
    found = suite.parse(f"{CELL}    layout: [{{}}, {{expert_parallel: 2}}]\n", "mine.yaml", layout=given)
    assert {each.layout.expert_parallel for each in found.experiments} == {4}
    for wrong in ("expert_parallel", "=4", "expert_parallel=4,,"):
        with pytest.raises(UserError, match=r"--layout: .*: write FIELD=VALUE"):
            fields_of(wrong)


@pytest.mark.parametrize(
    ("size", "across", "shape", "first", "second"),
    [
        (4, False, (1, 4), [0, 1, 2, 3], [4, 5, 6, 7]),
        (4, True, (2, 2), [0, 2, 4, 6], [1, 3, 5, 7]),
        (2, False, (1, 2), [0, 1], [2, 3]),
        (2, True, (2, 1), [0, 4], [1, 5]),
        (1, True, (1, 1), [0], [1]),
    ],
)
def test_groups_fill_nodes_or_cross_them(size, across, shape, first, second):
    groups = Groups.of(Topology(SHAPE), size, across)
    assert groups.shape == shape
    assert groups.members[:2].tolist() == [first, second]
    assert [groups.of_rank(rank) for rank in first] == [(0, at) for at in range(size)]
    nodes = Topology(SHAPE).unit_of(0)
    for ranks in groups:  # a group's own levels are those of the whole
        assert (groups.topology.unit_of(0) == np.unique(nodes[ranks], return_inverse=True)[1]).all()


def test_what_groups_say_is_put_together_by_rank():
    groups = Groups.of(Topology(SHAPE), 4, across=True)
    ranks = np.arange(8)
    assert groups.joined([ranks[of] for of in groups]).tolist() == ranks.tolist()
    matrix = np.arange(64.0).reshape(8, 8)
    found = groups.blocks([matrix[np.ix_(of, of)] for of in groups])
    same = ranks[:, None] % 2 == ranks % 2
    assert (found == np.where(same, matrix, 0)).all()
    placed = groups.contiguous(8)
    assert placed.hosts.sum(1).tolist() == [2] * 8
    for at, of in enumerate(groups):
        assert (placed.hosts[:, of] == Placement.contiguous(8, 4).hosts).all()
        assert (groups.placement(placed, at).hosts == Placement.contiguous(8, 4).hosts).all()


def test_tokens_of_some_ranks_are_a_routing_of_their_own():
    routing = Routing(np.arange(16, dtype=np.int32).reshape(8, 2), (1, 2, 1, 4), 16)
    part = routing.gathered(np.array([[1], [3]]))
    assert part.tokens == (2, 4)
    assert part.ids.tolist() == routing.ids[[1, 2, 4, 5, 6, 7]].tolist()
    assert (part.counts == routing.counts[[1, 3]]).all()
    folded = routing.gathered(np.array([[0, 2], [1, 3]]))
    assert folded.tokens == (2, 6)
    assert (folded.counts == Routing(folded.ids, folded.tokens, 16).counts).all()


@pytest.mark.parametrize(
    ("members", "apart", "scope"),
    [
        (8, 1, "flat"),
        (4, 1, "intra1"),
        (2, 4, "inter1"),
        (4, 2, "4by2.flat"),
        (2, 1, "2by1.intra1"),
        (2, 2, "2by2.intra1"),
    ],
)
def test_groups_that_no_scope_names_are_a_part_of_the_smallest_that_holds_them(members, apart, scope):
    assert scope_of(members, apart, SHAPE) == scope
    assert meeting(scope, SHAPE) == (members, apart)


def test_default_layouts_leave_digests_as_they_are():
    first = suite.load("quick").experiments[0]
    assert first.layout == Layout()
    assert "layout" not in first.model_dump(mode="json")
    assert presets.cluster("local-8").shape == SHAPE
