"""What this machine is: `python -m benchmarks.gpu.environment FILE` writes it as JSON, and fails where training can't
be imported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def packages() -> dict[str, dict[str, str | None]]:
    """Per line of requirements.txt, the version `pinned` and the one `installed` (None: missing)."""
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return {name: {"pinned": pinned, "installed": _version(name)} for name, pinned in pins}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]  # +cpu, +cu130: said by `cuda`
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """Device, versions, and what compiled parts and attention kernels need."""
    import torch

    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    smi = shutil.which("nvidia-smi")
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "gpu": properties.name if properties else None,
        "gpus": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory if properties else None,
        "driver": subprocess.run(driver, capture_output=True, text=True).stdout.split("\n")[0] if smi else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "c_compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
        "python_headers": headers.exists(),
        "triton": _version("triton"),
        "flash_attention_3": find_spec("flash_attn_interface") is not None,
        "packages": packages(),
    }


def main(file: str) -> int:
    Path(file).write_text(json.dumps(environment(), indent=2))
    import bov_megatron.training.run  # noqa: F401  (fails where a package is missing that training needs)

    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
