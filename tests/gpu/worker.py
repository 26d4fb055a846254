"""Does steps, one a line of stdin, and answers each with one line: ``python -m tests.gpu.worker FD MODULE EMULATED``.

The supervisor (``tests.gpu.smoke``) ends it when a step takes too long."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

from harness.launch.kernel import die_with_parent
from tests.gpu.step import do, failed


def main(fd: int, module: str, emulated: bool) -> None:
    die_with_parent()
    steps = importlib.import_module(module)
    known = {step.number: step for step in steps.STEPS}
    with os.fdopen(fd, "w", buffering=1) as answers:
        try:
            machine = steps.machine(emulated)
        except ModuleNotFoundError:  # the steps that need it say so
            machine = None
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(failed(error)), file=answers)
            return
        print(json.dumps({"status": "ready"}), file=answers)
        for line in sys.stdin:
            found = do(known[int(line)], machine)
            if found["status"] == "failed":
                print(found["reason"], file=sys.stderr, flush=True)
            print(json.dumps(found, default=float), file=answers)
            if machine is not None:
                machine.tidy()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "emulated")
