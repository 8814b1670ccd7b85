"""Imported once by the server that ranks are forked from (tests/distributed.py): what they would each import."""

import megatron.core.dist_checkpointing  # noqa: F401

import bov_megatron.training.run  # noqa: F401
import tests.golden_files  # noqa: F401
from bov_megatron.data.cache import import_streaming

import_streaming()
import streaming.base.format  # noqa: E402, F401
