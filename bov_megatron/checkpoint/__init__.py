"""Checkpoints."""

from bov_megatron.checkpoint.saving import *
