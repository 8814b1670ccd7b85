"""Convert checkpoints: a run's to Hugging Face's format and back, and the reference implementation's into a run.

bov convert to-hf RUN_DIR OUT                        export a run as a Hugging Face model
bov convert from-hf EXPORT RUN_DIR                   an export of ours into a run that trains on
bov convert from-nanochat CHECKPOINT_DIR RUN_DIR     a checkpoint of the paper's code into a run that trains on
bov convert roundtrip RUN_DIR                        to Hugging Face and back, every weight compared bit for bit
"""

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_to_hf(commands)
    _add_from_hf(commands)
    _add_from_nanochat(commands)
    _add_roundtrip(commands)
    options = parser.parse_args(arguments)

    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    print(options.run(options))
    return 0


def _add_to_hf(commands) -> None:
    to_hf = commands.add_parser(
        "to-hf",
        help="export a run as a Hugging Face model",
        description="Export a run's checkpoint as a folder that AutoModelForCausalLM.from_pretrained(OUT, "
        "trust_remote_code=True) loads. Any parallel layout can be converted, in one process. Logits of the export are "
        "compared with the Megatron model's unless --skip-parity is given.",
    )
    to_hf.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=_RUN_DIR)
    to_hf.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    to_hf.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="stored weights (default: as the run computed)")
    to_hf.add_argument("--tables", choices=("bf16", "int8"), help="stored value tables, int8 with a scale per row "
                       "(default: like the other weights)")  # fmt: skip
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one kept with the run)")
    to_hf.add_argument(
        "--skip-parity",
        action="store_true",
        help=_SKIP_PARITY,
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace OUT if it holds anything")
    _add_plan(to_hf)
    to_hf.set_defaults(run=_to_hf)


def _add_from_hf(commands) -> None:
    from_hf = commands.add_parser(
        "from-hf",
        help="make a run of an export of ours",
        description="Make a run folder of an export (of to-hf, or saved again by transformers), with a checkpoint that "
        "trains on at any layout and with either engine. The optimizer begins anew; step and data position are those "
        "that the export states.",
    )
    from_hf.add_argument("export", type=Path, metavar="EXPORT", help="folder of the export")
    from_hf.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder to make")
    _add_plan(from_hf)
    from_hf.set_defaults(run=_from_hf)


def _add_from_nanochat(commands) -> None:
    from_nanochat = commands.add_parser(
        "from-nanochat",
        help="make a run of a checkpoint of the paper's code",
        description="Make a run folder of a checkpoint of the paper's reference implementation, a fork of nanochat "
        "(model_*.pt and meta_*.json), with a checkpoint that trains on at any layout and with either engine. Value "
        "source and options come from the metadata; what this project lacks is refused by name. The optimizer begins "
        "anew, at the same step; the place in the reference's data is only noted in RUN_DIR/origin.json.",
    )
    from_nanochat.add_argument("checkpoint_dir", type=Path, metavar="CHECKPOINT_DIR", help="folder of the checkpoint")
    from_nanochat.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder to make")
    from_nanochat.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    from_nanochat.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of its tokenizer.pkl, converted, or of a tokenizer.json"
    )
    _add_plan(from_nanochat)
    from_nanochat.set_defaults(run=_from_nanochat)


def _add_roundtrip(commands) -> None:
    roundtrip = commands.add_parser(
        "roundtrip",
        help="check that nothing is lost on the way to Hugging Face and back",
        description="Export a run's checkpoint in fp32, make a run of the export, and compare every weight bit for "
        "bit. Nothing is kept; needs room for both in TMPDIR.",
    )
    roundtrip.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=_RUN_DIR)
    roundtrip.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    roundtrip.add_argument("--skip-parity", action="store_true", help=_SKIP_PARITY)
    _add_plan(roundtrip)
    roundtrip.set_defaults(run=_roundtrip)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="print the memory and disk it needs, and write nothing")


_SKIP_PARITY = "do not compare logits, which takes the whole model in memory, in fp32"
_RUN_DIR = "run folder, or one of its checkpoints/step_* folders"


def _to_hf(options) -> str:
    import torch

    from bov_megatron.exchange.convert import plan_to_hf, to_hf

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.plan:
        return _needs(plan_to_hf(options.run_dir, step=options.step, dtype=dtype, tables=options.tables), options.out)
    done = to_hf(
        options.run_dir,
        options.out,
        step=options.step,
        dtype=dtype,
        tables=options.tables,
        tokenizer_dir=options.tokenizer,
        check_parity=not options.skip_parity,
        overwrite=options.overwrite,
    )
    without = "" if done.has_tokenizer else ", without a tokenizer (the run has none; give one with --tokenizer)"
    cost = done.cost_of_tables
    tables = "" if cost is None else f"; tables in {options.tables} change them by: {cost}"
    return f"{done.out_dir}: step {done.step} of {done.checkpoint}{without}; {_parity(done.parity)}{tables}"


def _from_hf(options) -> str:
    from bov_megatron.exchange.from_hf import from_hf, plan_from_hf

    if options.plan:
        return _needs(plan_from_hf(options.export), options.run_dir)
    return str(from_hf(options.export, options.run_dir))


def _from_nanochat(options) -> str:
    from bov_megatron.exchange.from_nanochat import from_nanochat, plan_from_nanochat

    if options.plan:
        return _needs(plan_from_nanochat(options.checkpoint_dir, step=options.step), options.run_dir)
    return str(
        from_nanochat(options.checkpoint_dir, options.run_dir, step=options.step, tokenizer_dir=options.tokenizer)
    )


def _roundtrip(options) -> str:
    from bov_megatron.exchange.roundtrip import plan_roundtrip, roundtrip

    if options.plan:
        return _needs(plan_roundtrip(options.run_dir, step=options.step), "the folder for temporary files (TMPDIR)")
    done = roundtrip(options.run_dir, step=options.step, check_parity=not options.skip_parity)
    return (
        f"{done.checkpoint}: step {done.step}; {done.tensors} tensors, {done.elements:,} elements, are the same bit "
        f"for bit in the export and in the run made of it; {_parity(done.parity)}"
    )


def _needs(needs, out) -> str:
    from bov_megatron.exchange.needs import PROGRAM
    from bov_megatron.plan import format_size

    lines = [
        f"parameters: {needs.parameters:,}",
        f"disk: {format_size(needs.disk)} in {out}",
        f"memory: at most about {format_size(needs.memory)} beside the program's own {format_size(PROGRAM)}",
    ]
    if needs.memory_of_parity is not None:
        lines.append(f"comparing logits: {format_size(needs.memory_of_parity)} instead; --skip-parity leaves it out")
    return "\n".join(lines)


def _parity(parity) -> str:
    return "logits not compared" if parity is None else f"logits agree with the Megatron model's: {parity}"
