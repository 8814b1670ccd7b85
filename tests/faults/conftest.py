"""Faults on purpose. Each test prints what it did: `pytest tests/faults -s`. Not part of `make test`; `make faults`."""

import time

import pytest

from tests.slurm.conftest import cluster, job_environ, slurm_data  # noqa: F401


@pytest.fixture
def say(request, capsys):
    """`say(text)`: a line of this test's transcript, with the seconds since the test began."""
    began = time.monotonic()
    print(f"\n== {request.node.name}: {(request.function.__doc__ or '').strip().splitlines()[0]}")

    def line(text: str) -> None:
        print(f"  {time.monotonic() - began:6.1f} s  {text}", flush=True)

    return line
