"""This rank's device: a GPU, or the CPU."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bov_megatron.errors import LaunchError

FEWER_RANKS = "start as many ranks on a node as it has GPUs (--nproc-per-node, or --ntasks-per-node), or hide the GPUs \
with CUDA_VISIBLE_DEVICES="
"""What to do where ranks would share a GPU, which NCCL refuses."""


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """This rank's current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def device_name() -> str:
    """The GPU's name from its driver, or the CPU's architecture."""
    return torch.cuda.get_device_name() if has_gpu() else f"CPU, {platform.machine()}"


def visible_gpus() -> tuple[int, str, int]:
    """Number of GPUs that this process sees, and the first one's name and memory in bytes."""
    properties = torch.cuda.get_device_properties(0)
    return torch.cuda.device_count(), properties.name, properties.total_memory


def select_gpu(local_rank: int) -> None:
    """Make GPU `local_rank` of this node the current one, if there are GPUs.

    Raises LaunchError where there are fewer GPUs than local ranks.
    """
    if not has_gpu():
        return
    gpus = torch.cuda.device_count()
    if 1 < gpus <= local_rank:
        raise LaunchError(f"local rank {local_rank} has no GPU: this node shows {gpus}; {FEWER_RANKS}")
    # A single one, because Slurm may show each task only its own.
    torch.cuda.set_device(0 if gpus == 1 else local_rank)
    if os.environ.get("BOV_NUMA_BINDING", "1") != "0":
        bind_to_cpus_near_gpu()


def bind_to_cpus_near_gpu(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keep this process, and those it starts, on the CPUs of its GPU's NUMA node, as far as it may run on them.

    Memory then comes from there as well: Linux takes it from the node that touches it first. Nothing changes where the
    kernel doesn't say which CPUs are near, or the launcher has given this rank others.
    """
    gpu: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    with contextlib.suppress(OSError):  # such as a container that hides /sys
        mask = int((devices / address / "local_cpus").read_text().replace(",", ""), 16)
        if near := {cpu for cpu in os.sched_getaffinity(0) if mask >> cpu & 1}:
            os.sched_setaffinity(0, near)


def use_device(chosen: torch.device) -> None:
    """Make a GPU this thread's current one, where there are GPUs; a new thread begins with the first."""
    if has_gpu():
        torch.cuda.set_device(chosen)


class WithoutMemory(TorchFunctionMode):
    """Within it, `torch.empty` gives tensors of shapes alone, on the meta device, whichever device the caller names.

    A model built within it has all its parameters, and no weights. `torch.device("meta")` leaves alone what names its
    device, as Megatron does on a GPU.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on this rank's device, copied without waiting for the GPU."""
    if tensor.is_cuda or not has_gpu():
        return tensor
    # Only copies from pinned memory are asynchronous. torch keeps pinned blocks and hands them out again once copies
    # from them are done, so that memory is pinned in the first steps alone.
    return tensor.pin_memory().to(device(), non_blocking=True)


def has_fast_bf16_products(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on `device` as such.

    On CPUs without AVX-512 torch takes a loop for them that is five to eight times slower than the product in fp32.
    """
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def backend() -> str:
    """The torch.distributed backend for this machine."""
    return "nccl" if has_gpu() else "gloo"
