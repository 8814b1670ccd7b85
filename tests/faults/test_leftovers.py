"""What a killed run leaves on its machine: nothing of it stops or slows the next start, and nothing piles up."""

import os
import statistics
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from bov_megatron.data.cache import LOCK_FOLDER
from tests.support.launcher import Launch
from tests.support.runs import overrides

RUN = ["train.steps=400", "checkpoint.interval=5", "checkpoint.asynchronous=true", "checkpoint.keep_last=2"]
KILLS = 4
OWN = tuple(f"{Path(folder).resolve()}/" for folder in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
"""The environment and this checkout, which may lie under /tmp: their libraries are mapped, and stay."""


def files_of(process: psutil.Process) -> set[str]:
    """Files outside of this test's folder that a process has open or mapped and that live in memory or /tmp: shared
    memory, semaphores, sockets."""
    folder = Path(f"/proc/{process.pid}")
    paths = {os.readlink(link) for link in (folder / "fd").iterdir() if link.is_symlink()}
    paths |= {line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()}
    return {path for path in paths if may_be_left(path)}


def may_be_left(path: str) -> bool:
    return path.startswith(("/dev/shm/", "/tmp/", "/run/")) and "pytest" not in path and not path.startswith(OWN)


def segments_of(processes: set[int]) -> list[str]:
    """System V shared memory made by these processes, which the kernel keeps after their death."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return [line for line in lines if int(line.split()[4]) in processes]


@pytest.fixture
def stale_segments():
    """Shared memory as a killed run of StreamingDataset leaves it, which stops that program's next start."""
    from streaming.base.constant import SHM_TO_CLEAN

    paths = [Path(f"/dev/shm/{prefix:06}_{name}") for prefix in (0, 1) for name in SHM_TO_CLEAN]
    made = [path for path in paths if not path.exists()]
    for path in made:
        path.write_bytes(b"stale")
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def test_libraries_of_an_environment_under_tmp_are_not_leftovers(monkeypatch):
    assert f"{Path(sys.prefix).resolve()}/" in OWN
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="clone-") as clone:
        library = Path(clone) / "site-packages" / "library.so"
        library.parent.mkdir()
        library.write_bytes(b"x")
        with open(library):
            assert str(library) in files_of(psutil.Process()), "or the next line would say nothing"
            monkeypatch.setattr(sys.modules[__name__], "OWN", (f"{clone}/",))
            assert str(library) not in files_of(psutil.Process())


def test_leftovers_of_killed_runs(prepared_data, tmp_path, stale_segments, say):
    """kill -9 of all ranks at once, again and again, with a shared cache; then what lies about is counted."""
    arguments = overrides(
        prepared_data, tmp_path / "run", *RUN, f"data.path={tmp_path}/cache", f"data.remote={prepared_data.folder}"
    )
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as control:
        assert control.name in files_of(psutil.Process()), "or nothing would be found below either"
    say(f"{len(stale_segments)} stale segments in /dev/shm, {stale_segments[0].name} and others")
    seconds, processes, files = [], set(), set()
    for number in range(KILLS):
        with Launch(2, arguments, tmp_path / f"start{number}") as launch:
            launch.wait_for("save")
            seconds.append(launch.seconds)
            family = [psutil.Process(rank.pid) for rank in launch.ranks]
            family += [child for parent in list(family) for child in parent.children(recursive=True)]
            processes |= {process.pid for process in family}
            files |= set().union(*map(files_of, family))
            for rank in (0, 1):
                launch.kill(rank)
            launch.wait()
            psutil.wait_procs(family, timeout=10)
            assert not any(process.is_running() for process in family), "a process outlived its rank"
        left = sorted(path.name for path in (tmp_path / "run").iterdir())
        say(f"start {number + 1}: first save after {seconds[-1]:.1f} s, ranks killed; in its folder: {', '.join(left)}")
    # The first start alone downloads the data.
    say(f"time to the first save: {seconds[1]:.1f} s after one kill, {seconds[-1]:.1f} s after {KILLS - 1}")
    assert statistics.median(seconds[-2:]) < 2 * statistics.median(seconds[:2]) + 1
    # Pytest's own folder lies elsewhere with --basetemp.
    left = [path for path in files if Path(path).exists() and not path.startswith(f"{tmp_path.parent}/")]
    say(f"files in /dev/shm, /run and /tmp that the ranks held: {sorted(files)}, left: {left}")
    assert not left and not segments_of(processes)
    assert all(path.read_bytes() == b"stale" for path in stale_segments), "somebody else's, for all we know"
    unfinished = [path.name for path in (tmp_path / "run/checkpoints").glob("*.saving")]
    leases = [path.name for path in (tmp_path / "run").glob("lease.json*")]
    say(f"in the run folder: {len(unfinished)} unfinished checkpoint(s), {leases}")
    assert len(unfinished) <= 1 and len(leases) <= 2
    assert len(list((tmp_path / "cache" / LOCK_FOLDER).iterdir())) < 40
