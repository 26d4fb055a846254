"""A YAML file stands wherever the name of a preset does."""

from __future__ import annotations

import json

import pytest

from harness import presets
from harness.bench import suite
from harness.errors import UserError

CLUSTER = "kind: emulated\nlevels:\n- {name: node, size: 2, bandwidth_bytes_per_s: 1.0e8}\n- {name: rank, size: 2}\n"
MODEL = "{num_layers: 32, hidden: 64, ffn: 64, num_experts: 8, top_k: 2, seq: 128}"
WORKLOAD = "{tokens_per_rank: 64, generator: zipf, params: {target: 2.0}}"
EXPERIMENTS = """
name: mine
experiments:
- {model: shapes/my-model.yaml, cluster: my-cluster.yaml, workload: [my-workload.yml, balanced-128], system: flat,
   phase: exchange}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my-cluster.yaml").write_text(CLUSTER)
    (tmp_path / "my-workload.yml").write_text(WORKLOAD)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "my-model.yaml").write_text(MODEL)
    (tmp_path / "mine.yaml").write_text(EXPERIMENTS)
    return tmp_path


def test_in_an_experiments_file_their_paths_are_relative_to_it(folder):
    found = suite.load(folder / "mine.yaml").experiments
    assert [each.workload.name for each in found] == ["my-workload", "balanced-128"]
    assert {(each.model.name, each.cluster.name) for each in found} == {("my-model", "my-cluster")}
    own = presets.cluster(str(folder / "my-cluster.yaml"))
    assert found[0].cluster == own
    assert own.levels[0].bandwidth_bytes_per_s == 1e8


def test_a_name_in_the_file_is_the_name_and_no_part_of_its_path_is(folder):
    (folder / "my-cluster.yaml").write_text(f"name: twins\n{CLUSTER}")
    assert presets.cluster("my-cluster.yaml", folder).name == "twins"
    (folder / "9 nodes (ours).yaml").write_text(CLUSTER)
    assert presets.cluster("9 nodes (ours).yaml", folder).name == "9-nodes-ours-"


def test_a_file_is_read_anew(folder):
    before = presets.cluster("my-cluster.yaml", folder)
    (folder / "my-cluster.yaml").write_text(CLUSTER.replace("1.0e8", "2.0e8"))
    assert presets.cluster("my-cluster.yaml", folder).digest != before.digest


def test_list_takes_files_and_names(moebench, folder):
    status, out, _ = moebench("list", "cluster", folder / "my-cluster.yaml", "local-2", "--json")
    assert status == 0
    assert [row["name"] for row in json.loads(out)] == ["my-cluster", "local-2"]
    assert "2 node x 2 rank" in moebench("list", "clusters", folder / "my-cluster.yaml")[1]
    assert "my-model" in moebench("list", "model", folder / "shapes" / "my-model.yaml")[1]
    assert "my-workload" in moebench("list", "workloads", folder / "my-workload.yml")[1]
    (row,) = json.loads(moebench("list", "suite", folder / "mine.yaml", "--json")[1])
    assert (row["name"], row["cells"], row["phases"], row["clusters"]) == ("mine", 2, "exchange", "my-cluster")


def test_a_slurm_cluster_file_is_what_joins_its_nodes(moebench):
    from harness.sweep import spec

    known = spec.load_cluster("example-gpu")
    assert presets.cluster(str(known.path)) == known.cluster.interconnect


def test_place_plans_for_files(moebench, folder):
    status, out, err = moebench(
        *("place", "--model", folder / "shapes" / "my-model.yaml", "--trace", "record-l32e8k2.parquet"),
        *("--cluster", folder / "my-cluster.yaml", "--out", folder / "p.json", "--method", "exflow"),
        *("--time-limit", "1", "--json"),
    )
    assert status == 0, err
    made = json.loads(out)
    assert (made["model"], made["cluster"], made["num_ranks"]) == ("my-model", "my-cluster", 4)


def test_profile_starts_the_ranks_of_a_file(moebench, folder, monkeypatch):
    """As far as its ledger's file, which is damaged, and so nothing is measured."""
    monkeypatch.chdir(folder)
    (folder / "results" / "ledger").mkdir(parents=True)
    (folder / "results" / "ledger" / "my-cluster.json").write_text("{")
    status, _, err = moebench("profile", "my-cluster.yaml", "--model", "shapes/my-model.yaml")
    assert status == 2
    assert "my-cluster.json': is damaged" in err


def test_a_sweep_takes_files(moebench, folder):
    text = EXPERIMENTS + "slurm: one-machine\n"
    (folder / "sweep.yaml").write_text(text)
    (folder / "other.yaml").write_text("name: other\nslurm: one-machine\nsuite: mine.yaml\n")
    for name in ("sweep", "other"):
        status, out, err = moebench("sweep", folder / f"{name}.yaml", "--on", "slurm", "--dry-run", "--results", folder)
        assert status == 0, err
        assert "#SBATCH" in out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("my-cluster.yaml", CLUSTER.replace("bandwidth_", "bandwith_"), "levels.0.bandwith_bytes_per_s: '1.0e8':"),
        ("my-cluster.yaml", CLUSTER.replace("bandwidth_", "bandwith_"), "did you mean 'bandwidth_bytes_per_s'?"),
        ("my-cluster.yaml", CLUSTER.replace("size: 2}", "size: two}"), "my-cluster.yaml.levels.1.size: 'two': Input"),
        ("my-cluster.yaml", "- 1", "my-cluster.yaml: [1]: must be a mapping with the fields of a cluster"),
        ("my-cluster.yaml", "interconnect: 8", "my-cluster.yaml: interconnect: 8: must be a mapping"),
        ("my-cluster.yaml", "{kind: local", "my-cluster.yaml line 2: "),
        ("my-cluster.yaml", "!!python/object/apply:os.system [id]", "is not valid YAML"),
        ("my-workload.yml", "\0", "is not valid YAML"),
        ("shapes/my-model.yaml", MODEL.replace("top_k: 2", "top_k: 9"), "top_k = 9 is larger than num_experts = 8"),
        ("shapes/my-model.yaml", None, "shapes/my-model.yaml': cannot be read (no such file); did you mean '"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_field(moebench, folder, file, text, message):
    if text is None:
        (folder / file).rename(folder / "shapes" / "my-modell.yaml")
    else:
        (folder / file).write_text(text)
    status, out, err = moebench("run", folder / "mine.yaml", "--dry-run")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert file.rsplit("/", 1)[-1] in err
    assert "mine.yaml: experiments[0]" in err


def test_unknown_names_and_folders(folder):
    with pytest.raises(UserError, match=r"did you mean 'emulated-2x4'\? known clusters \(or give a YAML file\) are"):
        presets.cluster("emulated-2x5")
    (folder / "my-cluster.yaml").unlink()
    (folder / "my-cluster.yaml").mkdir()
    with pytest.raises(UserError, match=r"cluster file: '.*my-cluster\.yaml': cannot be read"):
        presets.cluster("my-cluster.yaml", folder)
