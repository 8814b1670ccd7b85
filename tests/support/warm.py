"""What ranks would each import, imported once by the server that they are forked from (distributed.py)."""

import os
import sys
from importlib.util import find_spec

# Asked for a GPU in another way, CUDA starts in the server, and its forks can't use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

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

# A machine without one of these runs the other tests (`make gpu`).
if find_spec("deepspeed"):
    import bov_megatron.engines.deepspeed.engine
if find_spec("lm_eval"):
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401

    import bov_megatron.evaluation.lm_eval_engine  # noqa: F401
