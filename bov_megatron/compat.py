"""Making third-party packages importable where their binary parts don't match, and quieter where they repeat
themselves once a rank."""

from __future__ import annotations

import importlib.abc
import os
import sys
import warnings

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def register_missing_torchvision_ops() -> None:
    """Let torchvision's CUDA wheel import beside a CPU build of torch. Call before `streaming` or `transformers`.

    On such a pair torchvision's compiled operators don't load, and its import then fails with "operator
    torchvision::nms does not exist", which takes both packages down. Declaring the two schemas is enough: nothing
    here calls them. Does nothing with a CUDA or ROCm torch, without torchvision, or when called again. A child
    process that doesn't inherit this one's memory must call it too.
    """
    import importlib.util

    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    # A Library takes its operators away when collected; torch.ops lives as long as the process does.
    torch.ops.torchvision._bov_megatron_library = library


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; registers the operators when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            register_missing_torchvision_ops()
        return None


def install_torchvision_fix() -> None:
    """Do `register_missing_torchvision_ops` whenever this process comes to import torchvision. tools/setup_env.sh has
    every start of the environment's Python call it where the installed pair doesn't match, so that an export loads
    there with plain transformers."""
    sys.meta_path.insert(0, _BeforeTorchvision())


def quiet_megatron_imports() -> None:
    """Silence what Megatron-core 0.16.1 says on every rank: that optional packages are absent, which this project
    does without, and that torch 2.13 deprecates names it calls. Call before importing it."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r"`(torch\.distributed\..*|load_state_dict)` is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
