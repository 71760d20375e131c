"""The fast part of the fault matrix, and a small budget of random input for each of its fuzzers."""

from __future__ import annotations

import pytest

from tests.faults import doors, fuzz
from tests.faults.harness import Case, run_case, same_lines
from tests.faults.sandbox import Shared
from tests.faults.tables import all_cases

FAST = [case for case in all_cases() if case.fast]
SLOW = [case for case in all_cases() if not case.fast]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("area", sorted({case.area for case in FAST}))
def test_every_case_of_an_area_holds(shared, area, cases=FAST):
    results = [run_case(case, shared) for case in cases if case.area == area]
    failed = [f"{result.case.name}: {'; '.join(result.problems)}" for result in results if result.problems]
    assert not failed, "\n".join(failed)
    assert not same_lines(results), "\n".join(same_lines(results))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("area", sorted({case.area for case in SLOW}))
def test_every_slow_case_of_an_area_holds(shared, area):
    doors.preload()
    test_every_case_of_an_area_holds(shared, area, SLOW)


@pytest.mark.parametrize("name", fuzz.FUZZERS)
def test_random_input_works_or_is_one_line(name):
    outcome = fuzz.try_out(name, 60)
    assert outcome.held, outcome.problem


def test_debug_shows_the_traceback(tmp_path):
    seen = doors.call(["train", "--config", "none.yaml"], tmp_path, {"KRONA_DEBUG": "1"}, {}, 60)
    assert seen.status == 2 and "Traceback" in seen.err and "error: none.yaml: no such file" in seen.err


def test_the_harness_sees_what_it_should(shared):
    """A case that does not hold is told: status, line, missing file, file outside, traceback, late end."""

    def made_outside(box):
        box.config({"train.steps": 0})
        return ["train", "--config", "dog.yaml"]

    wrong = Case("self", "all wrong", made_outside, 0, "no such words", exists=("runs/dog/none",))
    problems = " / ".join(run_case(wrong, shared).problems)
    for expected in ("exit status 2 instead of 0", "does not say", "runs/dog/none is missing"):
        assert expected in problems, problems


def test_the_harness_sees_writes_and_code(shared):
    """What a door leaves outside the output folders, and a canary, are problems of the case."""

    def convert_into_the_open(box):
        from tests.faults.adapters import dog

        dog(box)
        box.canary().touch()
        return ["convert", "dog.safetensors", "elsewhere.safetensors", "--to", "lora"]

    problems = " / ".join(run_case(Case("self", "open", convert_into_the_open, 0, ""), shared).problems)
    assert "'elsewhere.safetensors' was made" in problems and "code from a file was run" in problems, problems
