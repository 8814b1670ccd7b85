"""What can be evaluated: an export, a run folder, or one of its checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bov_megatron.data.tokenizer import Encoder, load_encoder
from bov_megatron.errors import EvaluationError
from bov_megatron.lifecycle import run_folder
from bov_megatron.parallel.device import has_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    folder: Path
    """Of the export, or of the checkpoint."""
    tokenizer: Path
    is_export: bool

    def load(self, device: str | None = None, dtype: str = "auto", bank_device: str | None = None) -> PreTrainedModel:
        """The model, in this process and in evaluation mode: an export, or a checkpoint as the model that it exports
        to.

        Args:
            device: None means a GPU if there is one.
            dtype: `auto` is that of the export, or that in which the run computed.
            bank_device: where value tables are, as in BovConfig; None means what the export's configuration says.

        Raises EvaluationError for a `bank_device` that the target can't have.
        """
        if self.is_export:
            model = self._load_export(dtype, bank_device)
        else:
            from bov_megatron.exchange.convert import in_memory

            if bank_device == "mmap":
                raise EvaluationError(
                    f"--bank-device mmap: {self.folder} is a checkpoint, and only an export's tables can be mapped; "
                    "give --bank-device cpu, or an export (bov convert to-hf)"
                )
            model = in_memory(self.folder, None if dtype == "auto" else getattr(torch, dtype), bank_device)
        return model.to(device or ("cuda" if has_gpu() else "cpu")).eval()

    def _load_export(self, dtype: str, bank_device: str | None) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        # The code of an export is its own, and may be older than this.
        config = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=True)
        if bank_device is not None:
            if not hasattr(config, "bank_device"):
                raise EvaluationError(
                    f"--bank-device {bank_device}: {self.folder} was exported before there was a bank_device; export "
                    "it again (bov convert to-hf)"
                )
            config.bank_device = bank_device
        return AutoModelForCausalLM.from_pretrained(
            str(self.folder), config=config, trust_remote_code=True, dtype=dtype
        )

    def encoder(self) -> Encoder:
        """Its tokenizer. Raises EvaluationError for one that the model was not trained with."""
        encoder, trained_with = load_encoder(self.tokenizer), None
        if self.is_export:
            vocab_size = json.loads((self.folder / "config.json").read_text())["vocab_size"]
        else:
            from bov_megatron.checkpoint.loading import read_run

            run = read_run(self.folder)
            vocab_size, trained_with = run["recipe"]["model"]["vocab_size"], run["extra"].get("tokenizer_hash")
        if encoder.vocab_size > vocab_size or trained_with not in (None, encoder.hash):
            with_hash = f" (hash {trained_with[:12]})" if trained_with else ""
            raise EvaluationError(
                f"{self.tokenizer} is not the tokenizer of {self.folder}: it has {encoder.vocab_size:,} ids and hash "
                f"{encoder.hash[:12]}, the model {vocab_size:,} ids{with_hash}; put back the one that the model was "
                "trained with"
            )
        return encoder

    def digest(self) -> str:
        """Of the names, sizes and times of its files: changes when they are written anew."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                state = path.stat()
                digest.update(f"{path.relative_to(self.folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def find_target(target: Path, step: int | None = None) -> Target:
    """The export in `target`; or of a run folder its newest checkpoint, or that of `step`; or the checkpoint `target`.

    Raises EvaluationError or CheckpointError where there is none.
    """
    if (target / "config.json").is_file():
        if step is not None:
            raise EvaluationError(f"--step {step}: {target} is an export, which is of one step; leave it out")
        return Target(target, target, is_export=True)
    if not run_folder.list_checkpoints(target) and run_folder.step_of(target) is None:
        raise EvaluationError(
            f"{target} is neither an export (no config.json) nor a run folder with checkpoints; give a folder "
            "written by `bov convert to-hf` or by training"
        )
    path = run_folder.find_checkpoint(target, step)
    return Target(path, run_folder.run_dir_of(path) / run_folder.TOKENIZER, is_export=False)
