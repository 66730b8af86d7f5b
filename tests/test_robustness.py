"""A slice of `benchmarks/robustness`: damaged inputs of every kind, and what the benchmark itself measures."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.robustness import __main__ as program
from benchmarks.robustness import jobs, media, results

# Without AVIF, which the lowest version of Pillow does not have, and without inputs whose failure is known.
SEEDS = {
    "images": (1, 2, 8, 14, 22),
    "videos": (0, 3, 8),
    "metadata": (4, 8),
    "sidecars": (0, 9),
    "models": (0, 3, 13),
    "features": (1, 4),
}


@pytest.fixture(autouse=True)
def memory_of_earlier_tests(monkeypatch):
    """Raises the limit by the memory of this process, which a forked one has as well."""
    used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(jobs, "MAX_BYTES", jobs.MAX_BYTES + used)
    monkeypatch.setattr(jobs, "KILL_BYTES", jobs.KILL_BYTES + used)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return results.Workplace(tmp_path_factory.mktemp("robustness"))


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_inputs_are_read_or_named(workplace, kind):
    found = program.check(workplace, kind, SEEDS[kind])
    assert [result for result in found if result.outcome in results.FAILURES] == []


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_a_seed_makes_the_same_file(tmp_path, kind):
    for seed in (1, 3, 8):
        damage, path = media.make_file(kind, seed, tmp_path)
        before = path.read_bytes()
        assert media.make_file(kind, seed, tmp_path) == (damage, path)
        assert path.read_bytes() == before


def test_jobs_are_measured_and_ended():
    job = jobs.run(lambda: np.ones(20_000_000).sum() and 3)
    assert (job.status, job.failure) == (3, None) and job.peak_bytes > 160_000_000
    job = jobs.run(lambda: time.sleep(60), max_seconds=0.3)
    assert (job.status, job.failure) == (None, "hang") and 0.3 < job.seconds < 10
