"""A rank's step without a GPU, weights or other ranks: its memory, collectives, kernels and shortest time."""

from bov_megatron.simulation.report import Simulation, format_simulation, simulate

__all__ = ["Simulation", "format_simulation", "simulate"]
