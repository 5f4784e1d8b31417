"""A few hundred of the inputs of tests/fuzz.py, the same in each run, and all that failed once."""

from __future__ import annotations

import fuzz
import pytest
from hypothesis import given, settings

EXAMPLES = {"predictions": 25, "beside": 15, "annotations": 60}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_broken_file_is_refused_in_one_line(name):
    @settings(max_examples=EXAMPLES.get(name, 100), database=None, derandomize=True, **fuzz.QUIET)
    @given(fuzz.TARGETS[name][1]())
    def look(raw: bytes) -> None:
        fuzz.attempt(name, raw)

    for path in fuzz.cases(name):
        fuzz.attempt(name, path.read_bytes())
    look()
