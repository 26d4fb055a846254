"""``python -m tests.goldens [name ...]``: freeze anew, and say which numbers have changed. Names: of studies and of
suites; by default all."""

from __future__ import annotations

import sys

from harness.studies import studies
from tests.goldens.frozen import DATA, SUITES, changes, of_study, of_suite, write


def main(names: list[str]) -> None:
    every = [*SUITES, *studies()]
    if unknown := set(names) - set(every):
        sys.exit(f"goldens: {', '.join(sorted(unknown))}: unknown; known are {', '.join(every)}")
    count = 0
    for name in names or every:
        tables = of_suite(name) if name in SUITES else of_study(name)
        for gone in {path.stem for path in DATA.glob(f"{name}.*.csv")} - set(tables):
            print(f"{gone}: is gone")
            (DATA / f"{gone}.csv").unlink()
        for key, table in tables.items():
            if told := changes(key, table):
                count += len(told)
                print("\n".join(told), flush=True)
                write(key, table)
    print(f"{count} changes" if count else "nothing has changed")


if __name__ == "__main__":
    main(sys.argv[1:])
