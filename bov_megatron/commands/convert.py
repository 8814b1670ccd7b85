"""Convert checkpoints between a run's format and Hugging Face's."""

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bov convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser(
        "to-hf",
        help="export a run as a Hugging Face model",
        description="Export a run's checkpoint as a folder that AutoModelForCausalLM.from_pretrained(OUT, "
        "trust_remote_code=True) loads. Any parallel layout can be converted, in one process. Logits of the export are "
        "compared with the Megatron model's unless --skip-parity is given.",
    )
    to_hf.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder, or one of its checkpoints/step_* folders")
    to_hf.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    to_hf.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="stored weights (default: as the run computed)")
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one kept with the run)")
    to_hf.add_argument("--skip-parity", action="store_true", help="do not compare logits")
    to_hf.add_argument("--overwrite", action="store_true", help="replace OUT if it holds anything")
    options = parser.parse_args(arguments)

    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    import torch

    from bov_megatron.exchange.convert import to_hf as convert

    done = convert(
        options.run,
        options.out,
        step=options.step,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        tokenizer_dir=options.tokenizer,
        check_parity=not options.skip_parity,
        overwrite=options.overwrite,
    )
    parity = "not compared" if done.parity is None else f"agree with the Megatron model's to {done.parity:.1e}"
    print(f"{done.out_dir}: step {done.step} of {done.checkpoint}; logits {parity}")
    return 0
