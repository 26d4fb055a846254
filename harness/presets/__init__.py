"""Set-ups by name: models, clusters and workloads of the papers, and small ones for one machine.

A preset is a mapping in ``models.yaml``, ``clusters.yaml`` or ``workloads.yaml`` beside this file; its key is its name.
Published numbers carry their ``source``; what a source leaves open carries an ``interpretation``. A YAML file of the
same fields stands wherever a name does; without a ``name`` it is called as the file is. With ``preset: NAME`` among
its fields the others change that preset.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from harness.errors import bad, unknown
from harness.presets import this_machine
from harness.spec import PROSE, UNNAMED
from harness.specs import Cluster, Model, Workload

Kind = Literal["models", "clusters", "workloads"]
SPECS: dict[Kind, type[Cluster | Model | Workload]] = {"models": Model, "clusters": Cluster, "workloads": Workload}


FILES = (".yaml", ".yml")


def model(name: str, folder: Path | None = None) -> Model:
    """The model preset called ``name``, or the model in that YAML file (relative to ``folder``, by default the working
    directory); ``UserError`` with the nearest and the known names if there is none."""
    return _named("models", name, folder)


def cluster(name: str, folder: Path | None = None) -> Cluster:
    """The cluster preset called ``name``, or the GPUs of this machine (``one-gpu``, ``gpu-node``), or the cluster in a
    YAML file, as ``model``; of a Slurm cluster's file what joins its nodes."""
    if name in this_machine.SIZES:
        return this_machine.cluster(name)
    return _named("clusters", name, folder)


def workload(name: str, folder: Path | None = None) -> Workload:
    """The workload preset called ``name``, or the workload in a YAML file, as ``model``."""
    return _named("workloads", name, folder)


def is_file(name: object) -> bool:
    """Whether ``name`` means a YAML file and no preset."""
    return isinstance(name, str) and name.endswith(FILES)


def names(kind: Kind) -> list[str]:
    """Names of all presets of a kind, in the order of the file (local ones first)."""
    return list(_file(kind))


def parse_yaml(text: str, where: str) -> Any:
    """Safe YAML that also refuses a key written twice; ``UserError`` names ``where`` and the line."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:  # the latter of its values
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        raise bad(f"{where}{line}", problem, "is not valid YAML; correct that line") from None


def _named(kind: Kind, name: str, folder: Path | None) -> Any:
    return read(kind, (folder or Path()) / name) if is_file(name) else _preset(kind, name)


def read(kind: Kind, path: Path) -> Any:
    """What a YAML file describes; ``UserError`` names the file and the field."""
    singular = kind.removesuffix("s")
    data = read_yaml(path, f"{singular} file")
    if not isinstance(data, dict):
        raise bad(str(path), data, f"must be a mapping with the fields of a {singular}")
    where = str(path)
    if kind == "clusters" and "interconnect" in data:  # a Slurm cluster's file
        data, where = data["interconnect"], f"{path}: interconnect"
    if not isinstance(data, dict):
        raise bad(where, data, f"must be a mapping with the fields of a {singular}")
    if "preset" in data:
        return based(kind, data, where)
    stem = re.sub("[^A-Za-z0-9._+-]+", "-", path.stem).lstrip("-._+") or singular
    return SPECS[kind].parse({"name": stem[:80], **data}, where)


def based(kind: Kind, data: Mapping[str, Any], where: str) -> Any:
    """A preset with the changes that stand beside its name: ``{preset: qwen3-30b-a3b, num_layers: 94}``; of a cluster
    also ``nodes``, units of its outermost level. Without a ``name`` it is called by what it is."""
    changes = {key: value for key, value in data.items() if key not in ("preset", "nodes")}
    base: Any = {"models": model, "clusters": cluster, "workloads": workload}[kind](data["preset"])
    told = [f"{key} = {value}" for key, value in data.items() if key not in ("preset", "name", *PROSE)]
    plain = [f"{key}{value}" for key, value in changes.items() if isinstance(value, str | int | float)]
    inner = [f"{k}{v}" for value in changes.values() if isinstance(value, Mapping) for k, v in value.items()]
    inner += [key for key, value in changes.items() if isinstance(value, list)]
    fields = {"name": _word(base.name, *plain, *inner, most=80)}
    if inner and "name" not in data:
        fields["hashed_name"] = _word(base.name, *plain, most=80)  # as digests had it before names told these
    if told:
        fields["interpretation"] = f"{base.interpretation} Changed from the preset: {', '.join(told)}.".strip()
    found = SPECS[kind].parse({**base.model_dump(), **fields, **changes}, where)
    if kind != "clusters" or "nodes" not in data:
        return found
    nodes = data["nodes"]
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise bad(f"{where}.nodes", nodes, "must be a whole number of at least 1")
    resized = found.resized(nodes)
    return resized.model_copy(update={"name": data["name"]}) if "name" in data else resized


def unnamed(kind: Kind, data: Mapping[str, Any], where: str) -> Any:
    """A spec without a name, which is called by what it is; its digest does not know."""
    found = SPECS[kind].parse({"name": UNNAMED, **data}, where)
    match found:
        case Model():
            words = f"m{found.hidden}-h{found.ffn}-e{found.num_experts}k{found.top_k}-l{found.num_layers}"
        case Cluster():
            words = f"{found.kind if found.device == 'cpu' else found.device}-{'x'.join(map(str, found.shape))}"
        case Workload(tokens_per_rank=tokens):
            mean = max(tokens, default=0) if isinstance(tokens, tuple) else getattr(tokens, "mean", tokens)
            words = "-".join([found.generator, *(f"{key}{value}" for key, value in found.params.items()), str(mean)])
    told = f"{_word('own', words, most=60)}-{found.digest[:4]}"
    return found.model_copy(update={"name": told, "hashed_name": UNNAMED})


def _word(*parts: str, most: int) -> str:
    """A name of these, at most so long."""
    return re.sub("[^A-Za-z0-9._+-]+", "-", "-".join(parts))[:most]


def read_yaml(path: Path, what: str) -> Any:
    """What the file holds; ``UserError`` says ``what`` it is, and where there is none, which one is near."""
    try:
        return parse_yaml(path.read_text("utf-8"), str(path))
    except FileNotFoundError:
        beside = [each.name for each in path.parent.glob("*") if each.suffix in FILES]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "; give one that exists"
        raise bad(what, str(path), f"cannot be read (no such file){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise bad(what, str(path), f"cannot be read ({reason}); give a readable YAML file") from None


@functools.cache
def _preset(kind: Kind, name: str) -> Any:
    known = _file(kind)
    singular = kind.removesuffix("s")
    if name not in known:
        names = [*known, *this_machine.SIZES] if kind == "clusters" else known
        raise unknown(singular, name, names, f"{kind} (or give a YAML file)", like=str(name).lower())
    return SPECS[kind].parse({"name": name, **known[name]}, f"{singular} {name}")


@functools.cache
def _file(kind: Kind) -> dict[str, dict[str, Any]]:
    if kind not in SPECS:
        raise bad("kind of preset", kind, f"must be one of {', '.join(SPECS)}")
    where = f"presets/{kind}.yaml"
    text = importlib.resources.files(__package__).joinpath(f"{kind}.yaml").read_text(encoding="utf-8")
    found = parse_yaml(text, where)
    if not isinstance(found, dict) or not all(isinstance(fields, dict) for fields in found.values()):
        raise bad(where, type(found).__name__, "must map names to fields")
    return found


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, except that a key written twice is an error instead of a silent override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
