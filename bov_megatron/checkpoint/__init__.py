"""Checkpoints of a run: atomic folders, which any layout of ranks and either engine can load."""

from bov_megatron.checkpoint.loading import Loaded, load, newest_valid, read_run, read_weights, verify
from bov_megatron.checkpoint.saving import PendingSave, SaveError, begin_save, save

__all__ = [
    "Loaded", "PendingSave", "SaveError", "begin_save", "load", "newest_valid", "read_run", "read_weights", "save",
    "verify",
]  # fmt: skip
