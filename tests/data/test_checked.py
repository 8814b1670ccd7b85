"""Of a machine's processes, one checks each file; if it fails or is killed, another does."""

import os
import subprocess
import sys
import threading
import time

import pytest

from bov_megatron.data.checked import CheckedFiles

PROCESS = """
import os, sys, time
from bov_megatron.data.checked import CheckedFiles

files = CheckedFiles(sys.argv[1])
first = files.reserve(5) + files.reserve(20)
for number in range(20):
    def check():
        print(number, flush=True)
        time.sleep(float(sys.argv[2]))
    files.once(first + number, check)
"""


def start(name: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, name, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def files():
    made = CheckedFiles(os.urandom(8).hex())
    yield made
    made.remove_name()
    assert not made._path.exists()


def test_each_file_is_checked_once(files):
    name = files._path.name.rsplit("-", 1)[1]
    processes = [start(name, 0.01) for _ in range(3)]
    checked = [int(line) for process in processes for line in process.communicate(timeout=300)[0].split()]
    assert sorted(checked) == list(range(20))
    assert [process.returncode for process in processes] == [0] * 3
    files.reserve(25)
    for number in range(5, 25):
        files.once(number, lambda: pytest.fail("checked again"))


def test_another_checks_after_one_that_was_killed(files):
    name = files._path.name.rsplit("-", 1)[1]
    killed = start(name, 600)
    assert killed.stdout.readline() == "0\n"
    waiting = start(name, 0)
    time.sleep(0.5)
    killed.kill()
    assert waiting.communicate(timeout=300)[0].split() == [str(number) for number in range(20)]


def test_threads_wait_and_failures_are_each_one_s_own(files):
    failed, done = [], []

    def fail():
        time.sleep(0.05)
        raise ValueError("damaged")

    def check():
        try:
            files.once(7, fail)
        except ValueError:
            failed.append(1)

    threads = [threading.Thread(target=check) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 3
    for _ in range(2):
        files.once(7, lambda: done.append(1))
    assert done == [1]
