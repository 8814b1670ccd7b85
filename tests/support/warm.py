"""What every rank imports, imported once by the server that forks them (tests/support/distributed.py)."""

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
