"""``moebench profile``: fitted costs of one cluster, kept as JSON beside where they came from."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.bench import provenance
from harness.comm.profile import fit
from harness.errors import bad
from harness.launch.session import open_session
from harness.specs import Cluster

PROFILES = Path("results/profiles")
TIMEOUT_S = 300.0


def profile(cluster: Cluster, say: Callable[[str], None], folder: Path = PROFILES) -> dict[str, Any]:
    """Measure ``cluster``, fit, and write ``folder``/NAME.json. Returns what the file holds, and its ``path``."""
    path = folder / f"{cluster.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("profiles folder", str(folder), f"cannot be made ({error.strerror}); choose another folder") from None
    with (
        tempfile.TemporaryDirectory(prefix="moebench-profile-") as logs,
        open_session(cluster, log_dir=Path(logs), preload=("harness.comm.profile",)) as session,
    ):
        say(f"timing collectives on {cluster.num_ranks} ranks of {cluster.name}")
        payload = {"levels": [level.name for level in cluster.levels]}
        of_ranks = session.call("harness.comm.profile:measure", payload, timeout_s=TIMEOUT_S)
        evidence, network = session.evidence, dict(session.network)
    collectives, gemm = fit(of_ranks)
    found = {
        "cluster": cluster.model_dump(mode="json"),
        "digest": cluster.digest,
        "evidence": evidence,
        "network": network,
        "collectives": {key: each.model_dump() for key, each in collectives.items()},
        "gemm": gemm.model_dump(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **provenance.collect([]),
    }
    path.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    return found | {"path": str(path)}
