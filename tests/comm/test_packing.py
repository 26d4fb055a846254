"""Rows that travel in another format: rounded as the format says, restored, counted, and found where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from harness import registry
from harness.bench import conformance, race
from harness.comm import packing, trip
from harness.comm.job import Job
from harness.dtypes import TORCH_DTYPE, row_bytes
from harness.layer.rounding import rounded
from harness.specs import Experiment
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case
from tests.bench.test_train import flat_training
from tests.bench.test_witness import experiments

FP8 = "float8_e4m3"


def drawn(hidden: int, dtype: str) -> torch.Tensor:
    """Rows [64, hidden] of very different sizes, some columns zero, some as large as a scale holds or just larger."""
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(64, hidden, generator=generator) * 2.0 ** torch.randint(-9, 9, (64, 1), generator=generator)
    rows *= 2.0 ** torch.randint(-12, 1, (64, hidden), generator=generator)
    rows[0], rows[1, 0], rows[2, 0], rows[3, 0] = 0, 448, 448.5, 896
    return rows.to(TORCH_DTYPE[dtype])


def there_and_back(rows: torch.Tensor, sent: Any, part: str = "dispatch") -> torch.Tensor:
    return packing.restore(packing.pack(rows, sent, part), rows.shape[1], rows.dtype)


@pytest.mark.parametrize("sent", [FP8, "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", [1, 48, 128, 320])
def test_rows_are_rounded_as_the_format_says(sent: Any, dtype: str, hidden: int) -> None:
    rows = drawn(hidden, dtype)
    found = there_and_back(rows, sent)
    assert torch.equal(found, rounded(rows, sent))
    assert torch.equal(there_and_back(found, sent), found)  # however many hops there are
    exact, error = rows.double().abs(), (found.double() - rows.double()).abs()
    most = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in exact.split(128, 1)], 1)
    half = 2.0**-4 if sent == FP8 else 2.0**-8  # of the distance between numbers
    assert (error <= torch.maximum(exact * half, most * 2.0**-17)).all()
    assert (found == 0)[0].all()
    if sent == FP8:
        assert (there_and_back(rows, sent, "combine").double() == rows.bfloat16().to(rows.dtype).double()).all()


@pytest.mark.parametrize("part", ["dispatch", "combine", "combine_grad", "dispatch_grad"])
@pytest.mark.parametrize("sent", [FP8, "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_row_is_as_long_as_planned(part: str, sent: Any, count: int) -> None:
    for hidden in (1, 130, 256):
        case = make_case(Topology((2, 2)), model={"hidden": hidden}, exchange_dtype=sent)
        packed = packing.pack(torch.ones(count, hidden), sent, part)
        assert packed[:1].nbytes == row_bytes(case, part) * min(1, count)
        assert packing.restore(packed, hidden, torch.float32).tolist() == [[1.0] * hidden] * count


def test_what_is_not_finite_stays_so() -> None:
    rows = torch.ones(3, 256)
    rows[0, 3], rows[1, 200] = float("nan"), float("inf")
    for found in (there_and_back(rows, FP8), rounded(rows, FP8)):
        assert found.isfinite().all(1).tolist() == [False, False, True]
        assert (found[2] == 1).all()


def test_gradients_pass_the_rounding() -> None:
    rows = drawn(130, "float32").requires_grad_()
    rounded(rows, FP8).square().sum().backward()
    assert torch.equal(rows.grad, 2 * rounded(rows.detach(), FP8))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ on the ranks

SYSTEMS = ["flat", "hiermoe-hd2", "hiermoe-hd2+fsmoe", "ppmoe", "fastermoe", "hecate", "eps-moe"]


def restored_by(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``restore`` with what ``of`` makes of the scales [R, M / 128]."""

    def restore(sent: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        if sent.dtype == torch.uint8:
            scale = sent[:, hidden:].clone(memory_format=torch.contiguous_format).view(torch.float32)
            sent = torch.cat([sent[:, :hidden], of(scale).contiguous().view(torch.uint8)], 1)
        return packing.restore(sent, hidden, dtype)

    return restore


def neighbours(scale: torch.Tensor) -> torch.Tensor:
    return scale.roll(1, 1)


def checked(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: the rows of the check, with a fault in the exchange if one is named."""
    pack = trip.pack

    def saturated(rows: torch.Tensor, sent: Any, part: str) -> torch.Tensor:
        flat = rows.abs().amax(1, keepdim=True) * 0.5
        return pack(rows.clamp(-flat, flat) if part == "dispatch" else rows, sent, part)

    faults: dict[str, tuple[Any, str, Any]] = {
        "": (trip, "pack", pack),
        "wrong scale": (trip, "restore", restored_by(lambda scale: scale * (1 + 2.0**-4))),
        "half a scale": (packing, "LARGEST", 2 * packing.LARGEST),
        "scale of a neighbour": (trip, "restore", restored_by(neighbours)),
        "saturated": (trip, "pack", saturated),
        "not restored": (trip, "restore", restored_by(torch.ones_like)),
        "not rounded": (trip, "pack", lambda rows, *_: rows),
        "gradients in 8 bits": (trip, "pack", lambda rows, sent, part: pack(rows, sent, "dispatch")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[payload.get("fault", "")])
        return conformance.check(job, payload)


@pytest.mark.parametrize(
    ("sent", "dtype", "trials"),
    [
        (FP8, "float32", ["rank-without-tokens", "long", "exchange"]),
        (FP8, "bfloat16", ["uniform"]),
        ("bfloat16", "float32", ["ragged"]),
    ],
)
def test_systems_agree_with_the_oracle_of_rounded_rows(session, sent: str, dtype: str, trials: list[str]) -> None:
    payload = {"systems": SYSTEMS, "trials": trials, "dtypes": [dtype], "exchange_dtype": sent}
    rows = session("local-4").call("tests.comm.test_packing:checked", payload, timeout_s=200)[0]
    assert not [row for row in rows if row["status"] != "ok"]
    assert len(rows) >= len(SYSTEMS) * len(trials)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong scale", "off by"),
        ("half a scale", "off by"),
        ("scale of a neighbour", "off by"),
        ("saturated", "off by"),
        ("not restored", "off by"),
        ("not rounded", "off by"),
        ("gradients in 8 bits", "input_grad off by"),
    ],
)
def test_a_fault_of_packing_is_found(session, fault: str, words: str) -> None:
    payload = {"systems": ["flat"], "trials": ["long"], "dtypes": ["float32"], "exchange_dtype": FP8, "fault": fault}
    for rows in session("local-4").call("tests.comm.test_packing:checked", payload, timeout_s=60):
        assert rows[0]["status"] == "nonconforming", rows[0]
        assert words in rows[0]["reason"]


@pytest.mark.parametrize("sent", [FP8, "bfloat16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_bytes_sent_are_the_bytes_planned(session, system: str, sent: str) -> None:
    given: dict[str, Any] = {"tokens": (9, 4, 13, 0), "model": {"top_k": 4, "hidden": 130}, "exchange_dtype": sent}
    given["options"] = {"shadows": 2} if system == "fastermoe" else {}
    results = session("local-4").call("tests.baselines.recorded:step", {"system": system, "case": given})
    planned = registry.system(system).planned_bytes(make_case(Topology((2, 2)), **given))
    for direction in ("forward", "backward"):
        ours = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
        np.testing.assert_array_equal(ours, direction_bytes(planned, direction))


def raced(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """On a rank: a race in which, if asked for, columns get the scale of their neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        if payload["fault"]:
            patch.setattr(trip, "restore", restored_by(neighbours))
        return race.run_race(job, payload)


@pytest.mark.parametrize("phase", ["exchange", "layer", "train_step", "prefill"])
@pytest.mark.parametrize("fault", [False, True])
def test_a_fault_at_full_shape_is_found(session, phase: str, fault: bool) -> None:
    """The check before the race has one scale a row."""
    (cell,) = experiments(phase, ["flat"], "bfloat16")
    cell = cell.model_copy(update={"exchange_dtype": FP8})
    payload = {"experiments": [cell.model_dump(mode="json")], "repeats": 1, "warmup": 1, "fault": fault}
    for answer in session("local-2").call("tests.comm.test_packing:raced", payload, timeout_s=60):
        (outcome,) = answer["cells"].values()
        assert outcome["status"] == ("nonconforming" if fault else "ok"), outcome["reason"]
        assert not fault or "at full shape: output off by" in outcome["reason"]


TRAININGS = [("float32", ""), ("bfloat16", ""), ("float16", ""), ("float32", "experts")]


@pytest.mark.parametrize(("dtype", "without"), TRAININGS)
def test_losses_of_a_training_are_the_oracles(session, dtype: str, without: str) -> None:
    payload = {"experiment": flat_training("uniform") | {"dtype": dtype, "exchange_dtype": FP8}, "without": without}
    for row in session("local-2").call("tests.bench.test_train:loss_gate", payload):
        assert row["status"] == ("nonconforming" if without else "ok"), row


# ------------------------------------------------------------------------------------------------- what is not possible


def refused(system: str, shape: tuple[int, ...] = (2, 2), **given: Any) -> str:
    return registry.system(system).refuse(make_case(Topology(shape), exchange_dtype=FP8, **given)) or ""


def test_what_cannot_is_refused_as_data() -> None:
    assert "exchange slots sends rows in the format that is computed in" in refused("fsmoe")
    assert "tutel is not driven here with rows that travel as float8_e4m3" in refused("tutel")
    assert "one rank sends no rows" in refused("flat", (1,))
    assert "a rank alone in its node sends no rows" in refused("ppmoe", (4, 1))
    assert "gate softmoe sends mixtures" in refused("flat", model={"gate": "softmoe"}, generator="natural")
    assert not refused("megatron-deepep", dtype="bfloat16")
    assert not refused("hiermoe-hd2+fsmoe")


@pytest.mark.parametrize("name", ["megatron-deepep", "megatron-hybridep"])
def test_deepep_is_priced_with_rows_of_8_bits(name: str) -> None:
    given: dict[str, Any] = {"dtype": "bfloat16", "model": {"hidden": 4096}}
    before, after = (
        registry.system(name).planned_bytes(make_case(Topology((2, 4)), exchange_dtype=sent, **given))
        for sent in (None, FP8)
    )
    ratio = after["dispatch"].sum() / before["dispatch"].sum()
    assert 4224 / 8192 < ratio < 0.52  # 4,096 numbers and 32 scales of 4 bytes, and what is told beside a row
    assert all((after[part] == before[part]).all() for part in before if part != "dispatch")
    assert registry.system(name).layout(make_case(Topology((2, 4)), exchange_dtype=FP8, **given)) is not None


def test_a_field_at_its_default_changes_no_digest() -> None:
    (cell,) = experiments("layer", ["flat"])
    given = cell.model_dump(mode="json")
    assert "exchange_dtype" not in given
    other = Experiment.model_validate(given | {"exchange_dtype": FP8})
    assert other.race != cell.race
    assert other.formats == "float32, rows float8_e4m3"
    assert Experiment.model_validate_json(other.model_dump_json()) == other
