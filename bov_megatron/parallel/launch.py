"""Rank and world size of this process: from torchrun's variables, else from Slurm's, else a single process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from bov_megatron.errors import LaunchError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

# Below Linux's ephemeral ports (32768 and up), which other programs' outgoing connections use.
FIRST_PORT, PORT_COUNT = 20000, 10000
PORTS_PER_JOB = 16

# Slurm numbers batch scripts, interactive steps and the like from here; job steps count from 0.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Index among this node's ranks; under Slurm a node is Slurm's, even if several share a host."""
    local_world_size: int
    master_addr: str
    """Where rank 0 listens."""
    master_port: int
    launcher: str
    """`torchrun`, `slurm` or `single`."""


def detect_world(environ: Mapping[str, str] = os.environ) -> World:
    """Find this process's world.

    torchrun's variables come first (torchrun may run inside a Slurm job), then those of a Slurm job step, i.e. srun. A
    batch script, or a shell inside an allocation, is a single process. MASTER_ADDR and MASTER_PORT override Slurm's.

    Raises LaunchError for variables that are missing, not numbers or contradictory.
    """
    in_slurm = "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ
    if any(name in environ for name in TORCHRUN_VARIABLES):
        world = _torchrun_world(environ)
    elif in_slurm and _integer(environ, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP:
        world = _slurm_world(environ)
    else:
        address = environ.get("MASTER_ADDR", "127.0.0.1")
        port = _integer(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else _free_port()
        world = World(0, 1, 0, 1, address, port, "single")
    _check(world)
    return world


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """Unix time at which Slurm ends this job; None where there is no job, or Slurm doesn't say."""
    text = environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def export_world(world: World, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torchrun would, for torch, Megatron-core and child processes."""
    environ["RANK"] = str(world.rank)
    environ["WORLD_SIZE"] = str(world.world_size)
    environ["LOCAL_RANK"] = str(world.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(world.local_world_size)
    environ["MASTER_ADDR"] = world.master_addr
    environ["MASTER_PORT"] = str(world.master_port)


def is_first_of_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reads for its node what all ranks there need; after `export_world`."""
    return environ.get("LOCAL_RANK", "0") == "0"


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a Slurm node list such as `node[1-2,5],gpu-a[001-003]`, like `scontrol show hostnames`.

    Raises LaunchError for a malformed list.
    """
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", nodelist):
        raise LaunchError(f"node list '{nodelist}': brackets don't match")
    hosts: list[str] = []
    for item in re.split(r",(?![^\[]*\])", nodelist):  # at commas outside brackets
        names = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            choices = [text] if text else _expand_ranges(ranges, nodelist)
            names = [name + choice for name in names for choice in choices]
        hosts.extend(filter(None, names))
    return hosts


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not match:
            raise LaunchError(f"node list '{nodelist}': '{item}' is not a number or a range like 1-4")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise LaunchError(f"node list '{nodelist}': range '{item}' runs backwards")
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from Slurm's compressed form: `2(x3),1` is [2, 2, 2, 1].

    Raises LaunchError for malformed text.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not match:
            raise LaunchError(f"tasks per node '{text}': expected a form like 2(x3),1")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _torchrun_world(environ: Mapping[str, str]) -> World:
    present = [name for name in TORCHRUN_VARIABLES if name in environ]
    missing = [name for name in (*TORCHRUN_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise LaunchError(
            f"{', '.join(f'{name}={environ[name]}' for name in present)} set, but not {', '.join(missing)}: start with "
            f"torchrun or srun, which set them all, or unset {', '.join(present)}"
        )
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in TORCHRUN_VARIABLES)
    address, port = environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")
    return World(rank, world_size, local_rank, local_world_size, address, port, "torchrun")


def _slurm_world(environ: Mapping[str, str]) -> World:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _integer(environ, size_name)
    if environ.get("MASTER_PORT"):
        port = _integer(environ, "MASTER_PORT")
    else:  # the same for all tasks of a step, different for other jobs and steps on the same host
        job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
        port = FIRST_PORT + (job * PORTS_PER_JOB + step) % PORT_COUNT
    return World(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_local_world_size(environ, world_size),
        master_addr=environ.get("MASTER_ADDR") or _slurm_first_host(environ),
        master_port=port,
        launcher="slurm",
    )


def _slurm_local_world_size(environ: Mapping[str, str], world_size: int) -> int:
    node = _integer(environ, "SLURM_NODEID")
    # The step's own count first: SLURM_TASKS_PER_NODE is the job's, SLURM_NTASKS_PER_NODE what was requested.
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if environ.get(name):
            counts = expand_tasks_per_node(environ[name])
            if sum(counts) == world_size and node < len(counts):
                return counts[node]
    if environ.get("SLURM_NTASKS_PER_NODE"):
        return _integer(environ, "SLURM_NTASKS_PER_NODE")
    raise LaunchError(
        "the number of tasks on this node is unknown: none of SLURM_STEP_TASKS_PER_NODE, SLURM_TASKS_PER_NODE and "
        f"SLURM_NTASKS_PER_NODE fits a step of {world_size} tasks; give srun --ntasks-per-node"
    )


def _slurm_first_host(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if environ.get(name):
            hosts = expand_nodelist(environ[name])
            # On a single node, don't rely on the resolver knowing its name.
            return hosts[0] if len(hosts) > 1 else "127.0.0.1"
    raise LaunchError("neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: set MASTER_ADDR to rank 0's host")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check(world: World) -> None:
    size, source = world.world_size, f"({world.launcher}'s variables)"
    for name, rank, limit in (("", world.rank, size), ("local ", world.local_rank, world.local_world_size)):
        if not 0 <= rank < limit:
            raise LaunchError(f"{name}rank {rank} is not below the {name}world size {limit} {source}")
    if world.local_world_size > size:
        raise LaunchError(f"local world size {world.local_world_size} exceeds the world size {size} {source}")
    if not 0 < world.master_port < 65536:
        raise LaunchError(f"MASTER_PORT={world.master_port} is not a port: give one between 1 and 65535")


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise LaunchError(f"{name} is not set, though SLURM_PROCID is: start with srun (see docs/use/slurm.md)")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a whole number: unset it or start with torchrun or srun") from None
