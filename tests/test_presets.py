"""Presets resolve, say where their numbers come from, and agree with what the papers print elsewhere."""

from __future__ import annotations

import math

import pytest

from harness import presets
from harness.errors import UserError
from harness.routing import make_routing
from harness.specs import Cluster, Experiment, Model, Workload
from harness.topology import Topology

GET = {"models": presets.model, "clusters": presets.cluster, "workloads": presets.workload}
ALL = [(kind, name) for kind in GET for name in presets.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_preset_resolves_and_is_the_same_object_again(kind, name):
    spec = GET[kind](name)
    assert spec.name == name
    assert GET[kind](name) is spec


def test_digests_are_all_different():
    digests = [GET[kind](name).digest for kind, name in ALL]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(("kind", "name"), [each for each in ALL if not GET[each[0]](each[1]).source])
def test_what_has_no_source_is_our_own(kind, name):
    spec = GET[kind](name)
    assert not getattr(spec, "collectives", None)
    assert getattr(spec, "kind", "local") != "physical"
    if kind == "models":
        assert name.startswith(("moe-tiny", "local-", "gpt-tiny-moe", "record-"))


@pytest.mark.parametrize(
    "name", [name for name in presets.names("clusters") if presets.cluster(name).kind == "physical"]
)
def test_published_clusters_state_units_and_interpretations(name):
    cluster = presets.cluster(name)
    assert "arXiv" in cluster.source
    assert cluster.interpretation
    assert cluster.device_flops_per_s > 1e12
    for key, collective in cluster.collectives.items():
        rate = 1 / collective.beta_s_per_byte
        assert 0.5e9 < rate < 100e9, f"{key}: {rate:.3g} bytes/s cannot be right for a buffer of one GPU"
        assert 1e-6 < collective.alpha_s < 1e-2, f"{key}: start-up in seconds"
    if cluster.gemm:
        assert 2 / cluster.gemm.beta_s_per_mac < cluster.device_flops_per_s


@pytest.mark.parametrize(
    ("name", "shards", "factor", "measured_ms"),
    [
        ("fsmoe-a", 8, 2.0, {"a2a.inter": 19.5, "ag.intra": 12.3, "rs.intra": 13.7, "ar.inter": 26.45}),
        ("fsmoe-b", 4, 2.4, {"a2a.inter": 28.3, "ag.intra": 39.6, "rs.intra": 40.8}),
    ],
)
def test_fsmoe_constants_predict_what_the_paper_measured(name, shards, factor, measured_ms):
    """Table 2, one Mixtral layer, B 4, L 1024, float32: two all-to-alls, all-gather and reduce-scatter of the expert
    shards (factor k f) and of the attention. As printed, testbed A's all-gather would take over 100 ms.
    """
    elements = 4 * 1024 * 4096
    sizes = {
        "a2a.inter": [factor * elements / shards] * 2,
        "ag.intra": [factor * elements, elements],
        "rs.intra": [factor * elements, elements],
        "ar.inter": [2.5 * 4096**2 / shards],
    }
    cluster = presets.cluster(name)
    for key, measured in measured_ms.items():
        cost = cluster.collectives[key]
        found_ms = 1e3 * sum(cost.alpha_s + cost.beta_s_per_byte * 4 * n for n in sizes[key])
        assert found_ms == pytest.approx(measured, rel=0.14), key


def test_fsmoe_a_gemm_predicts_the_measured_experts():
    """Table 2, Mixtral on testbed A: three GEMMs of k f B L tokens, H sharded over 8 GPUs, measured as 15.6 ms."""
    gemm = presets.cluster("fsmoe-a").gemm
    macs = 2 * 4 * 1024 * 4096 * 14336 / 8
    assert 1e3 * 3 * (gemm.alpha_s + gemm.beta_s_per_mac * macs) == pytest.approx(15.6, rel=0.08)


def test_hiermoe_constants_give_the_known_prediction_for_an_exchange_without_deduplication():
    """T = 1024 a GPU, k = 8, bf16, uniform routing over 32 GPUs: 34.2 ms for M 3584."""
    cluster, model = presets.cluster("hiermoe"), presets.model("deepseek-v3-half")
    assert cluster.shape == (4, 2, 2, 2)
    flat = cluster.collectives["a2a.flat"]
    size = 1024 * model.top_k * model.hidden * 2
    assert 1e3 * (flat.alpha_s + flat.beta_s_per_byte * size) == pytest.approx(34.2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-moe-s", 1.84), ("gpt-moe-l", 7.36), ("bert-moe", 3.27), ("bert-moe-deep", 6.54)]
)
def test_hecate_models_have_their_printed_parameter_counts(name, billions):
    model = presets.model(name)
    experts = model.num_experts * 2 * model.hidden * model.ffn
    attention = 4 * model.hidden**2
    assert model.num_layers * (experts + attention) / 1e9 == pytest.approx(billions, abs=0.005)


def test_pangu_pro_moe_has_its_printed_parameter_counts():
    """72 billion, a token uses 16: routed and shared experts, attention with grouped keys, embeddings."""
    model = presets.model("pangu-pro-moe")
    expert = 3 * model.hidden * model.ffn
    attention = 2 * model.hidden**2 * (1 + model.num_kv_heads / model.num_heads)
    rest = model.num_layers * (model.num_shared_experts * expert + attention) + 2 * model.vocab * model.hidden
    assert (model.num_layers * model.num_experts * expert + rest) / 1e9 == pytest.approx(72, abs=0.05)
    assert (model.num_layers * model.top_k * expert + rest) / 1e9 == pytest.approx(16.5, abs=0.05)
    assert model.num_groups == presets.workload("pangu-pro-moe").params["num_groups"]


def test_fsmoe_models_have_one_expert_for_every_node():
    for model, cluster in (("gpt2-xl-moe-fsmoe-a", "fsmoe-a"), ("mixtral-8x7b-fsmoe-b", "fsmoe-b")):
        assert presets.model(model).num_experts == presets.cluster(cluster).num_nodes


@pytest.mark.parametrize("name", presets.names("workloads"))
def test_every_workload_can_be_routed(name):
    workload = presets.workload(name)
    model = Model(name="m", num_layers=1, hidden=8, ffn=8, num_experts=64, top_k=8)
    routing = make_routing(workload, model, Topology((2, 4)))
    assert (routing is None) == (workload.generator == "natural")


@pytest.mark.parametrize(
    ("get", "name", "near"),
    [
        (presets.model, "Mixtral-8x7", "mixtral-8x7b"),
        (presets.cluster, "emulated-2x5", "emulated-2x4"),
        (presets.workload, "balanced-521", "balanced-512"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(get, name, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'") as caught:
        get(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def fields(**changes):
    """Of a model; what changes to ``...`` is left out."""
    given = {"name": "m", "num_layers": 1, "hidden": 8, "ffn": 8, "num_experts": 4, "top_k": 2} | changes
    return {key: value for key, value in given.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k = 5 is larger than num_experts = 4"),
        ({"hidden": -8}, r"model m.hidden: -8: .*greater than or equal to 1"),
        ({"ffn": 0}, r"model m.ffn: 0"),
        ({"hidden": ...}, r"model m.hidden: None: is missing; needed are name, num_layers, hidden, ffn,"),
        ({"hiden": 8}, r"model m.hiden: 8: unknown field; did you mean 'hidden'\? known fields are"),
        ({"num_groups": 3}, r"num_groups = 3 does not divide num_experts = 4"),
        ({"num_heads": 8, "num_kv_heads": 3}, r"num_kv_heads = 3 does not divide num_heads = 8"),
        ({"hidden": "wide"}, r"model m.hidden: 'wide'"),
        ({"name": "two words"}, r"model m.name: 'two words'"),
    ],
)
def test_bad_shapes_name_field_value_and_remedy(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        Model.parse(fields(**changes), "model m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["a2a", "a2a.inter@0", "A2A.inter", "a2a.inter@many"])
def test_a_collective_is_keyed_by_operation_scope_and_ranks(key):
    levels = [{"name": "node", "size": 2}]
    with pytest.raises(UserError, match="collectives"):
        Cluster.parse(
            {
                "name": "c",
                "kind": "physical",
                "levels": levels,
                "collectives": {key: {"alpha_s": 1, "beta_s_per_byte": 1}},
            },
            "cluster c",
        )


def test_a_forgotten_word_is_told_with_those_it_may_be():
    with pytest.raises(UserError, match=r"own.yaml.kind: None: is missing; needed are name, kind \(local, emulated, "):
        Cluster.parse({"name": "own", "levels": [{"name": "node", "size": 2}]}, "own.yaml")


def test_a_changed_copy_is_another_experiment():
    model = presets.model("moe-tiny")
    before = model.digest
    changed = model.model_copy(update={"hidden": 128})
    assert changed.digest != before
    assert changed.model_copy(update={"hidden": model.hidden}).digest == before


def test_rewording_a_note_makes_no_other_experiment():
    def experiment(note, **changes):
        model = Model.parse(fields(interpretation=note, **changes), "m")
        workload = Workload(name="w", source=note)
        cluster = presets.cluster("local-2")
        return Experiment(model=model, cluster=cluster, workload=workload, system="flat", phase="layer")

    one, other = experiment("as printed"), experiment("as printed, we think")
    assert (one.digest, one.race) == (other.digest, other.race)
    assert experiment("as printed", hidden=16).digest != one.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"mine.yaml line 3: \"?.key 'a' is written twice"),
        ("a: {b: 1, b: 2}", r"mine.yaml line 1"),
        ("a: [1, 2\nb: 3", r"mine.yaml line 2"),
        ("a: !!python/object/apply:os.getcwd []", r"mine.yaml line 1"),
    ],
)
def test_bad_yaml_names_the_file_and_the_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        presets.parse_yaml(text, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_merged_keys_may_be_overridden():
    assert presets.parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "f")["b"] == {"x": 1, "y": 3}
    assert math.isclose(presets.cluster("emulated-2x4").levels[0].bandwidth_bytes_per_s, 400e6 / 8)
