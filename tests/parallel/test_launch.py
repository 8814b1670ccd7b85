"""The world a process finds itself in. A rank that misreads it hangs the run or trains as several single ones."""

import os
import subprocess
import sys

import pytest

from bov_megatron.errors import LaunchError
from bov_megatron.parallel.launch import World, detect_world, expand_nodelist, expand_tasks_per_node, export_world

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29400",
}
# As srun sets them for the last of 2 + 2 + 1 tasks.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[07-08],big1",
    "SLURM_JOB_NODELIST": "node[07-08],big1",
}


def without(environ: dict, *names: str) -> dict:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun():
    assert detect_world(TORCHRUN) == World(5, 8, 1, 4, "head", 29400, "torchrun")


def test_torchrun_within_a_slurm_step_prevails():
    assert detect_world(SLURM | TORCHRUN).launcher == "torchrun"


def test_real_torchrun_is_understood(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from bov_megatron.parallel.launch import detect_world\n"
        "w = detect_world()\n"
        "print(f'{w.rank}/{w.world_size} {w.local_rank}/{w.local_world_size} {w.launcher}\\n', end='')\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split("\n")) == ["", "0/2 0/2 torchrun", "1/2 1/2 torchrun"]


def test_slurm():
    world = detect_world(SLURM)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (4, 5, 0, 1)
    assert (world.master_addr, world.launcher) == ("node07", "slurm")


def test_slurm_master_port_is_common_to_a_step_and_free_for_the_next_job():
    port = detect_world(SLURM).master_port
    first_rank = SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert detect_world(first_rank).master_port == port
    assert detect_world(SLURM | {"SLURM_JOB_ID": "4712"}).master_port != port
    assert detect_world(SLURM | {"SLURM_STEP_ID": "2"}).master_port != port
    assert 20000 <= port < 30000


def test_slurm_master_can_be_set():
    world = detect_world(SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "12345"})
    assert (world.master_addr, world.master_port) == ("10.0.0.7", 12345)


def test_one_slurm_node_needs_no_name_resolution():
    one_node = SLURM | {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node07",
    }
    world = detect_world(one_node)
    assert (world.master_addr, world.world_size, world.local_world_size) == ("127.0.0.1", 2, 2)


def test_step_smaller_than_its_job_counts_the_step():
    """`srun --ntasks=2` in a job of five: SLURM_TASKS_PER_NODE still speaks of the job."""
    step = SLURM | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node[07-08]",
    }
    world = detect_world(step | {"SLURM_PROCID": "1", "SLURM_NODEID": "1"})
    assert (world.rank, world.world_size, world.local_world_size) == (1, 2, 1)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1"},
        without(SLURM, "SLURM_PROCID", "SLURM_STEP_ID"),  # a shell that salloc opened
        without(SLURM, "SLURM_STEP_ID"),  # a batch script, before any srun
        SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step where Slurm does number it
    ],
    ids=["nothing", "master only", "allocation", "batch script", "numbered batch step"],
)
def test_single_process(environ):
    world = detect_world(environ)
    assert (world.rank, world.world_size, world.launcher, world.master_addr) == (0, 1, "single", "127.0.0.1")


def test_single_processes_on_one_machine_do_not_share_a_port():
    assert detect_world({"MASTER_PORT": "2000"}).master_port == 2000
    assert len({detect_world({}).master_port for _ in range(8)}) > 1


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("rest", [{}, SLURM], ids=["alone", "within slurm"])
def test_half_set_environment_is_refused(name, rest):
    with pytest.raises(LaunchError, match=rf"not {name}:.*torchrun or srun.*unset"):
        detect_world(rest | without(TORCHRUN, name))


@pytest.mark.parametrize(
    "environ, message",
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a whole number"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 is not below the world size 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 is not below the local world size 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "local world size 9 exceeds the world size 8"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), "give srun --ntasks-per-node"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(3)"}, r"tasks per node '2\(3\)'"),
        (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-2"}, r"node list 'node\[1-2': brackets don't match"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-b]"}, "'1-b' is not a number or a range"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[4-2]"}, "range '4-2' runs backwards"),
    ],
)
def test_contradictions_are_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        detect_world(environ)


@pytest.mark.parametrize(
    "nodelist, hosts",
    [
        ("login", ["login"]),
        ("node[1-2,5]", ["node1", "node2", "node5"]),
        ("a1,b[2-3],c", ["a1", "b2", "b3", "c"]),
        ("gpu-a[001-003]", ["gpu-a001", "gpu-a002", "gpu-a003"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("rack[1-2]n[3-4]-ib", ["rack1n3-ib", "rack1n4-ib", "rack2n3-ib", "rack2n4-ib"]),
    ],
)
def test_expand_nodelist(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


def test_expand_tasks_per_node():
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks_per_node("8") == [8]


def test_export_world_is_what_torchrun_would_set():
    environ: dict[str, str] = {}
    export_world(detect_world(SLURM), environ)
    assert environ == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(detect_world(SLURM).master_port),
    }
    assert detect_world(environ).launcher == "torchrun"  # child processes find a whole environment


def test_nothing_heavy_is_imported():
    check = "import sys, bov_megatron.parallel.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
