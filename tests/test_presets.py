"""Presets resolve, say where their numbers come from, and agree with what the papers print elsewhere."""

from __future__ import annotations

import math

import pytest
import yaml

from harness import presets
from harness.bench import suite
from harness.errors import UserError
from harness.layer.gpt import GPT
from harness.layer.work import parameters
from harness.routing import make_routing
from harness.routing.record import LocalMoE
from harness.routing.trace import find_trace, read_trace
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
    assert any(word in cluster.source for word in ("arXiv", "data sheet", "whitepaper"))
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


#: billions, all and of one token, as printed with a release; how many tables of the vocabulary each of them counts
PUBLISHED = {
    "qwen3-235b-a22b": ("235", "22", 2, 2),
    "qwen3-30b-a3b": ("30.5", "3.3", 2, 2),
    "deepseek-v3": ("671", "37", 2, 1),
    "deepseek-v2-lite": ("15.7", "2.4", 2, 1),
    "mixtral-8x7b": ("46.7", "12.9", 2, 2),
    "mixtral-8x22b": ("141", "39", 2, 2),
    "olmoe-1b-7b": ("6.9", "1.3", 2, 2),
    "gpt-oss-120b": ("116.83", "5.13", 2, 1),  # says so
    "gpt-oss-20b": ("20.91", "3.61", 2, 1),
    "kimi-k2": ("1040", "32.6", 2, 2),
    "glm-4.5": ("355", "32", 0, 0),  # says so
    "llama-4-maverick": ("400", "17", 2, 2),
    "phi-3.5-moe": ("41.9", "6.6", 2, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_their_published_parameter_counts(name):
    """Within 1 % of a number that is printed so."""
    *printed, of_all, of_active = PUBLISHED[name]
    model = presets.model(name)
    found = parameters(model, embeddings=of_all), parameters(model, active=True, embeddings=of_active)
    if name == "glm-4.5":  # counts the layer that predicts a second token among all
        found = parameters(model.model_copy(update={"num_layers": 93}), embeddings=of_all), found[1]
    for count, text in zip(found, printed, strict=True):
        last_digit = 10.0 ** -len(text.partition(".")[2]) if text != "1040" else 10.0  # 1.04 trillion
        assert abs(count / 1e9 - float(text)) <= 0.01 * float(text) + last_digit / 2, (name, count / 1e9, text)


def test_a_gpt_has_as_many_parameters_as_are_counted():
    fields = {"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "dense_ffn": 40, "num_shared_experts": 2}
    shapes = {"hidden": 32, "ffn": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "vocab": 64, "seq": 8}
    for ffn_type in ("gpt", "swiglu"):
        model = Model(name="m", num_experts=4, top_k=2, gate="softmax_topk", ffn_type=ffn_type, **fields, **shapes)
        gpt = GPT(model, lambda layer, model=model: LocalMoE(model, layer, 0), tied=False)
        norms = (2 * model.num_layers + 1) * model.hidden
        assert sum(p.numel() for p in gpt.parameters()) == parameters(model) + norms + model.seq * model.hidden


@pytest.mark.parametrize(
    ("kind", "data", "name", "changed"),
    [
        ("models", {"preset": "qwen3-30b-a3b", "num_layers": 94}, "qwen3-30b-a3b-num_layers94", {"num_layers": 94}),
        ("models", {"preset": "qwen3-30b-a3b", "name": "mine"}, "mine", {}),
        ("clusters", {"preset": "h100", "nodes": 8}, "h100-8-nodes", {"shape": (8, 8)}),
        ("clusters", {"preset": "h100", "nodes": 2, "name": "ours"}, "ours", {"shape": (2, 8)}),
        ("workloads", {"preset": "balanced-512", "seed": 3}, "balanced-512-seed3", {"seed": 3}),
    ],
)
def test_a_preset_can_be_a_base(kind, data, name, changed, tmp_path):
    spec, base = presets.based(kind, data, "f"), GET[kind](data["preset"])
    assert spec.name == name
    assert {field: getattr(spec, field) for field in changed} == changed
    assert spec.source == base.source
    assert ("Changed from the preset" in spec.interpretation) == bool(changed)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(data))
    assert GET[kind](str(tmp_path / "own.yaml")).digest == spec.digest
    entry = {
        "model": "olmoe-1b-7b",
        "cluster": "local-2",
        "workload": "balanced-512",
        "system": "flat",
        "phase": "layer",
    }
    found = suite.from_data({"name": "s", "experiments": [entry | {kind[:-1]: data}]}, "s", physical=True)
    assert getattr(found.experiments[0], kind[:-1]) == spec


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (
            "models",
            {"preset": "qwen3-30b-a3b", "num_layer": 9},
            r"f.num_layer: 9: unknown field; did you mean 'num_lay",
        ),
        ("models", {"preset": "qwen3-30b"}, r"'qwen3-30b': unknown; did you mean 'qwen3-30b-a3b'"),
        (
            "models",
            {"preset": "kimi-k2", "num_layers": 1},
            r"num_layers = 1 must be num_dense_layers = 1 and a multiple",
        ),
        ("clusters", {"preset": "h100", "nodes": 0}, r"f.nodes: 0: must be a whole number of at least 1"),
        ("clusters", {"preset": "h100", "node": 8}, r"f.node: 8: unknown field"),
    ],
)
def test_a_base_with_a_bad_field_is_one_line(kind, data, message):
    with pytest.raises(UserError, match=message) as caught:
        presets.based(kind, data, "f")
    assert "\n" not in str(caught.value)


def own(**fields):
    entry = {
        "model": {"num_layers": 2, "hidden": 64, "ffn": 32, "num_experts": 16, "top_k": 2},
        "cluster": {"kind": "emulated", "levels": [{"name": "node", "size": 2}, {"name": "rank", "size": 4}]},
        "workload": {"tokens_per_rank": 64, "generator": "zipf", "params": {"target": 2.0}},
        "system": "flat",
        "phase": "layer",
    }
    return suite.from_data({"name": "s", "experiments": [entry | fields]}, "s").experiments[0]


@pytest.mark.parametrize("fields", [{}, {"seed": 3}])
def test_a_mapping_without_a_name_is_called_by_what_it_is_and_its_digest_does_not_know(fields):
    found, named = own(**fields), {"name": "inline"}
    parts = {kind: getattr(found, kind) for kind in ("model", "cluster", "workload")}
    assert parts["model"].name.startswith("own-m64-h32-e16k2-l2-")
    assert parts["cluster"].name.startswith("own-emulated-2x4-")
    assert parts["workload"].name.startswith("own-zipf-target2.0-64-")
    as_before = own(
        **{kind: each.model_dump(exclude={"hashed_name", "seed"}) | named for kind, each in parts.items()}, **fields
    )
    assert as_before.workload.name == ("inline-s3" if fields else "inline")
    assert (found.digest, found.race) == (as_before.digest, as_before.race)
    again = Experiment.model_validate_json(found.model_dump_json())
    assert (again, again.digest) == (found, found.digest)


def test_two_mappings_without_a_name_have_two():
    levels = [{"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e9}, {"name": "rank", "size": 4}]
    assert own().cluster.name != own(cluster={"kind": "emulated", "levels": levels}).cluster.name
    assert own().cluster.resized(4).name == f"{own().cluster.name}-4-nodes"
    assert own().cluster.resized(4).hashed_name == "inline-4-nodes"


def test_what_changes_inside_a_field_of_a_base_is_in_its_name_and_not_in_its_digest():
    changed = own(workload={"preset": "zipf-4", "params": {"target": 2.0}}).workload
    assert changed.name == "zipf-4-target2.0"
    assert changed.digest == Workload(**changed.model_dump() | {"name": "zipf-4", "hashed_name": ""}).digest
    mine = own(workload={"preset": "zipf-4", "params": {"target": 2.0}, "name": "mine"}).workload
    assert mine.digest == Workload(**mine.model_dump()).digest != changed.digest


def test_fsmoe_models_have_one_expert_for_every_node():
    for model, cluster in (("gpt2-xl-moe-fsmoe-a", "fsmoe-a"), ("mixtral-8x7b-fsmoe-b", "fsmoe-b")):
        assert presets.model(model).num_experts == presets.cluster(cluster).num_nodes


@pytest.mark.parametrize("name", presets.names("workloads"))
def test_every_workload_can_be_routed(name):
    workload = presets.workload(name)
    trace = workload.params.get("path") or workload.params.get("like")
    top_k = min(8, read_trace(find_trace(str(trace))).header.top_k) if trace else 8
    model = Model(name="m", num_layers=1, hidden=8, ffn=8, num_experts=64, top_k=top_k)
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
        ({"num_layers": 4, "num_dense_layers": 1, "moe_every": 2, "dense_ffn": 8}, r"num_layers = 4 must be num_dense"),
        ({"num_layers": 2, "num_dense_layers": 1}, r"dense_ffn is missing"),
        ({"dense_ffn": 8}, r"dense_ffn = 8 belongs to num_dense_layers or moe_every"),
        ({"shared_ffn": 8}, r"shared_ffn = 8 belongs to num_shared_experts"),
        ({"q_lora_rank": 8}, r"q_lora_rank = 8 belongs to kv_lora_rank"),
        ({"kv_lora_rank": 8}, r"qk_rope_head_dim is missing"),
        ({"window_every": 2}, r"window_every = 2 belongs to attention_window"),
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
