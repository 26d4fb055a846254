"""Set-ups by name: models, clusters and workloads of the papers, and small ones for one machine.

A preset is a mapping in ``models.yaml``, ``clusters.yaml`` or ``workloads.yaml`` beside this file; its key is its name.
Published numbers carry their ``source``; what a source leaves open carries an ``interpretation``.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any, Literal

import yaml

from harness.errors import bad, unknown
from harness.presets import this_machine
from harness.specs import Cluster, Model, Spec, Workload

Kind = Literal["models", "clusters", "workloads"]
SPECS: dict[Kind, type[Spec]] = {"models": Model, "clusters": Cluster, "workloads": Workload}


def model(name: str) -> Model:
    """The model preset called ``name``; ``UserError`` with the nearest and the known names if there is none."""
    return _preset("models", name)


def cluster(name: str) -> Cluster:
    """The cluster preset called ``name``, or the GPUs of this machine (``one-gpu``, ``gpu-node``); ``UserError`` with
    the nearest and the known names if there is none."""
    if name in this_machine.SIZES:
        return this_machine.cluster(name)
    return _preset("clusters", name)


def workload(name: str) -> Workload:
    """The workload preset called ``name``; ``UserError`` with the nearest and the known names if there is none."""
    return _preset("workloads", name)


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


@functools.cache
def _preset(kind: Kind, name: str) -> Any:
    known = _file(kind)
    singular = kind.removesuffix("s")
    if name not in known:
        names = [*known, *this_machine.SIZES] if kind == "clusters" else known
        raise unknown(singular, name, names, kind, like=str(name).lower())
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
