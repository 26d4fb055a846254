"""EPS-MoE (Qian et al., arXiv 2410.12247): an expert pipeline, the experts of a rank in groups, so that the GEMMs of
one group run while the rows of another are on the wire.

A chunk of its pipeline is a group of experts and not of tokens: each expert meets all its rows at once, so its GEMMs
stay as large as without a pipeline and its weights are read once, while a pipeline over tokens (Tutel's, FSMoE's)
computes every expert once a chunk. For this it pays with nothing on the wire: the same rows travel, in as many
messages as a pipeline over tokens has.

Its claim (abstract): prefill up to 52.4 % faster than existing parallel inference. There it also chooses, by load,
between one grouped GEMM and a GEMM for each expert; here that is the harness's ``grouped`` choice, alike for all.

Interpretations: groups are of consecutive experts, the same number on each rank; copies of an expert, where a state
makes some, belong to its group. All groups are sent before the first one comes home. The same order serves backward,
which the paper, being about inference, does not have.
"""

from __future__ import annotations

from typing import ClassVar

from harness.comm.journey import Cut
from harness.options import whole
from harness.plan.native import NativeSystem
from harness.plan.schedule import Chunks
from harness.plan.slots import ExchangeSlot, Options, ScheduleSlot
from harness.system import Case

GROUPS = 4


class ExpertGroups(Chunks, ScheduleSlot):
    """Chunks are groups of every rank's experts."""

    name = "eps-moe"
    title = "in groups of each rank's experts, one group's hops beside another's products"
    source = "arXiv 2410.12247"
    options: ClassVar[Options] = {
        "expert_groups": f"of a rank's experts, one computing while others travel (default: {GROUPS}, at most as many "
        "as a rank has experts)"
    }

    def refuse(self, case: Case, exchange: ExchangeSlot) -> str | None:
        if exchange.name != "flat":
            return f"groups of experts travel apart, which the exchange {exchange.name} cannot; take the exchange flat"
        return None

    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        most = max(1, case.model.num_experts // case.topology.num_ranks)
        groups = whole(case, "expert_groups", min(GROUPS, most), most)
        return Cut(groups, groups, whole=False, by="experts")


class EPSMoE(NativeSystem):
    name = "eps-moe"
    title = "EPS-MoE: the exchange in groups of experts, beside the experts of other groups"
    source = "arXiv 2410.12247, the expert pipeline scheduler"
    schedule = ExpertGroups()
    options: ClassVar[dict[str, str]] = dict(ExpertGroups.options)
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {"one group": {"expert_groups": 1}}


#: brought to recipes, by name
SCHEDULES = {"eps-moe": ExpertGroups()}
