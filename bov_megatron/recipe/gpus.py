"""GPUs by name: peak, memory and links as their data sheets have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    peak_flops: float
    """Dense bf16 FLOP/s; data sheets print twice that, with sparsity."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    node_bandwidth: float
    """Bytes per second in one direction between GPUs that NVLink joins."""
    network_bandwidth: float
    """The same to other nodes: one network adapter per GPU, as in NVIDIA's own systems."""
    source: str
    node_gpus: int = 8
    """How many NVLink joins."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 312e12, 40e9, 1.555e12, 300e9, 25e9, "NVIDIA A100 Tensor Core GPU data sheet"),
        Gpu("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9, "NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM"),
        Gpu("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
        Gpu("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
        Gpu("GB200", 2500e12, 186e9, 8e12, 900e9, 50e9, "NVIDIA GB200 NVL72 data sheet, per GPU", 72),
        Gpu("B200", 2250e12, 180e9, 8e12, 900e9, 50e9, "NVIDIA DGX B200 data sheet, per GPU"),
    )
}
"""By name; a device is the first whose name is part of its own."""
DEFAULT_GPU = "H100"
"""What plans assume unless told otherwise."""


def peak_of_device(device_name: str) -> float | None:
    """Peak FLOP/s of a device by the name that its driver gives it, None where unknown (a CPU)."""
    return next((gpu.peak_flops for name, gpu in GPUS.items() if name in device_name), None)
