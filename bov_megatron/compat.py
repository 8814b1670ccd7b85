"""Workarounds for third-party packages: torchvision builds that don't match torch, and warnings on every rank."""

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
    """Make torchvision's CUDA wheel importable beside a CPU build of torch; call before anything imports torchvision.

    Does nothing with a CUDA or ROCm torch, without torchvision, or when called again.
    """
    # On such a pair torchvision's compiled operators don't load, and importing it (as streaming and transformers do)
    # fails with "operator torchvision::nms does not exist". Declaring the schemas is enough: nothing here calls them.
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
    # The operators go when the Library is collected; torch.ops lives as long as the process.
    torch.ops.torchvision._bov_megatron_library = library  # type: ignore[attr-defined]


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing, but registers the operators just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            register_missing_torchvision_ops()
        return None


def install_torchvision_fix() -> None:
    """Call `register_missing_torchvision_ops` if this process ever imports torchvision. Importing the package does it,
    and so does every start of Python in a mismatched environment from tools/setup_env.sh."""
    sys.meta_path.insert(0, _BeforeTorchvision())


def quiet_megatron_imports() -> None:
    """Silence Megatron-core 0.16.1's warnings of absent optional packages and of names that torch 2.13 deprecates.
    Call before importing it."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r"`(torch\.distributed\..*|load_state_dict)` is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
