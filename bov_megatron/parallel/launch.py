"""Which rank of which world this process is: from torchrun's variables, else Slurm's, else alone.

Imports nothing heavy and reads only the environment it is given; `export_world` then writes torchrun's
variables, so that everything after it (torch, Megatron-core, the data loader) need not know the launcher.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from bov_megatron.errors import LaunchError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

# Below Linux's ephemeral ports (32768 and up), from which other programs' outgoing connections take theirs.
FIRST_PORT, PORT_COUNT = 20000, 10000
PORTS_PER_JOB = 16

# Slurm numbers a batch script, an interactive step and the like from here; real steps count from 0.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Index among this node's ranks; under Slurm a "node" is Slurm's, even if several share a host."""
    local_world_size: int
    node_rank: int
    master_addr: str
    """Where rank 0 listens."""
    master_port: int
    launcher: str
    """`torchrun`, `slurm` or `single`."""


def detect_world(environ: Mapping[str, str] = os.environ) -> World:
    """Find this process's world.

    In this order: torchrun's variables (also when torchrun runs inside a Slurm job); a Slurm job step, i.e.
    started by srun; a single process. A batch script or a shell inside an allocation is no step: alone.
    MASTER_ADDR and MASTER_PORT, where set, prevail over what Slurm suggests.

    Raises:
        LaunchError: torchrun's variables are set in part, something is not a number, or ranks contradict sizes.
    """
    if any(name in environ for name in TORCHRUN_VARIABLES):
        world = _torchrun_world(environ)
    elif _in_slurm_step(environ):
        world = _slurm_world(environ)
    else:
        world = World(0, 1, 0, 1, 0, environ.get("MASTER_ADDR", "127.0.0.1"), _single_port(environ), "single")
    _check(world)
    return world


def export_world(world: World, environ: MutableMapping[str, str] = os.environ) -> None:
    """Write `world` as torchrun would: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    environ["RANK"] = str(world.rank)
    environ["WORLD_SIZE"] = str(world.world_size)
    environ["LOCAL_RANK"] = str(world.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(world.local_world_size)
    environ["MASTER_ADDR"] = world.master_addr
    environ["MASTER_PORT"] = str(world.master_port)


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a Slurm node list, in order, as `scontrol show hostnames` gives them.

    `node[1-2,5],gpu-a[001-003]` and several brackets in a name are understood; leading zeros are kept.

    Raises:
        LaunchError: the list is malformed.
    """
    hosts: list[str] = []
    for item in _split_outside_brackets(nodelist):
        names = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            choices = [text] if text else _expand_ranges(ranges, nodelist)
            names = [name + choice for name in names for choice in choices]
        hosts.extend(names)
    return hosts


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from Slurm's compressed form: `2(x3),1` is [2, 2, 2, 1].

    Raises:
        LaunchError: the text is malformed.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not match:
            raise LaunchError(f"tasks per node '{text}': expected a form like 2(x3),1")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _torchrun_world(environ: Mapping[str, str]) -> World:
    missing = [name for name in (*TORCHRUN_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        found = ", ".join(f"{name}={environ[name]}" for name in TORCHRUN_VARIABLES if name in environ)
        raise LaunchError(
            f"{found} set, but not {', '.join(missing)}: start with torchrun or srun, which set them all, "
            f"or unset {', '.join(name for name in TORCHRUN_VARIABLES if name in environ)}"
        )
    return World(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        node_rank=_integer(environ, "GROUP_RANK") if "GROUP_RANK" in environ else 0,
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        launcher="torchrun",
    )


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in environ:
        return False
    return "SLURM_STEP_ID" in environ and _integer(environ, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _slurm_world(environ: Mapping[str, str]) -> World:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size, node_rank = _integer(environ, size_name), _integer(environ, "SLURM_NODEID")
    return World(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_local_world_size(environ, world_size, node_rank),
        node_rank=node_rank,
        master_addr=environ.get("MASTER_ADDR") or _slurm_first_host(environ),
        master_port=_integer(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else _slurm_port(environ),
        launcher="slurm",
    )


def _slurm_local_world_size(environ: Mapping[str, str], world_size: int, node_rank: int) -> int:
    # The step's own count comes first: SLURM_NTASKS_PER_NODE is what was asked for, SLURM_TASKS_PER_NODE the job's.
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if environ.get(name):
            counts = expand_tasks_per_node(environ[name])
            if sum(counts) == world_size and node_rank < len(counts):
                return counts[node_rank]
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
            # On one node this always works, even where node names are not known to the resolver.
            return hosts[0] if len(hosts) > 1 else "127.0.0.1"
    raise LaunchError("neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: set MASTER_ADDR to rank 0's host")


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port all tasks of a step agree on, and other jobs or steps on the same host don't use."""
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return FIRST_PORT + (job * PORTS_PER_JOB + step) % PORT_COUNT


def _single_port(environ: Mapping[str, str]) -> int:
    if environ.get("MASTER_PORT"):
        return _integer(environ, "MASTER_PORT")
    with socket.socket() as probe:  # a fixed default would make two single runs on one machine collide
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check(world: World) -> None:
    for name, value, size_name, size in (
        ("rank", world.rank, "world size", world.world_size),
        ("local rank", world.local_rank, "local world size", world.local_world_size),
    ):
        if not 0 <= value < size:
            raise LaunchError(f"{name} {value} is not below the {size_name} {size} ({world.launcher}'s variables)")
    if world.local_world_size > world.world_size:
        raise LaunchError(
            f"local world size {world.local_world_size} exceeds the world size {world.world_size} "
            f"({world.launcher}'s variables)"
        )
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


def _split_outside_brackets(nodelist: str) -> list[str]:
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", nodelist):
        raise LaunchError(f"node list '{nodelist}': brackets don't match")
    return [item for item in re.split(r",(?![^\[]*\])", nodelist) if item]


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
