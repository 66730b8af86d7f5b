"""Every public name has an example in its docstring, and the examples run as printed."""

import doctest
from pathlib import Path

import pytest

import modeling_optsg

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", modeling_optsg.__all__)
def test_the_example_of_a_public_name_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    tests = doctest.DocTestFinder(recurse=False).find(getattr(modeling_optsg, name), name, globs={})
    examples = [example for test in tests for example in test.examples]
    assert examples, f"{name} has no example in its docstring"
    runner, report = doctest.DocTestRunner(optionflags=OPTIONS), []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
