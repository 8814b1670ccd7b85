"""Imported once by the server that forks ranks (tests/support/distributed.py): what each would import."""

import os
import sys

import megatron.core.dist_checkpointing  # noqa: F401
import torch

import bov_megatron.engines.megatron
import bov_megatron.training.run  # noqa: F401
import tests.support.golden_files  # noqa: F401

DEEPSPEED_CAME_ALONG = "deepspeed" in sys.modules
"""Whether the package imports it without being asked to (see test_deepspeed.py)."""

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import streaming.base.format  # noqa: E402, F401

import bov_megatron.engines.deepspeed.engine  # noqa: E402, F401
