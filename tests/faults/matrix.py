"""Run the real commands against every fault and every bad input of tests/faults/, and end with `held N of N`.

    python -m tests.faults.matrix                          # all cases: about 20 minutes on two cores
    python -m tests.faults.matrix --area config --fast     # one area; only what the tests run
    python -m tests.faults.matrix --fuzz-seconds 600       # and ten minutes of random configs, headers and images
    python -m tests.faults.matrix --list                   # names and exit statuses only, nothing is run

docs/reliability.md says what is promised.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from tests.faults import doors, fuzz  # noqa: E402
from tests.faults.harness import Case, Result, run_case, same_lines  # noqa: E402
from tests.faults.sandbox import Shared  # noqa: E402
from tests.faults.tables import AREAS, all_cases  # noqa: E402


def main() -> int:
    options = _options()
    os.environ.update(doors.QUIET)  # libraries read some of it when they are imported
    chosen = [case for case in all_cases(options.area) if (case.fast or not options.fast) and options.only in case.name]
    if options.list:
        return _list(chosen)
    if any(case.how == "fork" and not case.fast for case in chosen):
        doors.preload()
    started, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="krona-faults-") as room:
        shared = Shared(Path(room))
        for case in chosen:
            results.append(run_case(case, shared, options.keep))
            _print(results[-1])
    twins = same_lines(results)
    for twin in twins:
        print(f"the same line twice: {twin}")
    fuzzed = fuzz.run(options.fuzz_seconds) if options.fuzz_seconds else []
    for outcome in fuzzed:
        print(outcome)
    held = sum(not result.problems for result in results)
    print(f"{time.monotonic() - started:.0f} s")
    print(f"held {held} of {len(results)}")
    return 0 if held == len(results) and not twins and all(outcome.held for outcome in fuzzed) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", choices=AREAS, help="only the cases of one area")
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    parser.add_argument("--fast", action="store_true", help="only the cases that the tests run too")
    parser.add_argument("--fuzz-seconds", type=float, default=0, help="seconds of fuzzing, shared by the fuzzers")
    parser.add_argument("--keep", type=Path, help="folder for the sandboxes of cases that fail")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    return parser.parse_args()


def _list(cases: Sequence[Case]) -> int:
    for case in cases:
        print(f"{case.area:9} {case.status:3}  {case.name}")
    counts = Counter(case.area for case in cases)
    print(", ".join(f"{count} {area}" for area, count in counts.items()) + f": {len(cases)} cases")
    return 0


def _print(result: Result) -> None:
    word = "FAILED" if result.problems else "held  "
    print(f"{word} {result.case.area}: {result.case.name} [{result.seconds:.1f} s] {result.line[:160]}", flush=True)
    for problem in result.problems:
        print(f"       {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
