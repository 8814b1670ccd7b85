"""Tokenize text, JSON lines or Parquet and pack it into MDS shards for training, with a held-out split.

    bov prepare-data corpus/ --tokenizer tokenizers/mine --out data/mine --sequence-length 2048

Interrupted, run the same command again: finished units of the input are not done twice, and the result is the same.
manifest.json is written last; a folder without it is not read. The data set doesn't depend on --workers.
"""

import argparse
import time

from bov_megatron.data.corpus import INVALID_UTF8_POLICIES
from bov_megatron.data.prepare import PrepareOptions, prepare_data


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bov prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or glob: text (.txt, .md, .rst, .py, …: one document "
        "each), .jsonl (also .gz .bz2 .xz .zst), .parquet")  # fmt: skip
    add("--tokenizer", required=True, metavar="DIR", help="folder from `bov train-tokenizer`, or any byte-level one")
    add("--out", required=True, metavar="DIR", help="data set to write")
    add("--sequence-length", type=int, default=2048, help="a sample holds this + 1 tokens (default %(default)s)")
    add("--validation", nargs="+", default=[], metavar="INPUT", help="inputs to hold out whole")
    add("--validation-fraction", type=float, help="share of the documents to hold out, chosen by their content "
        "(default 0.01, or 0 with --validation)")  # fmt: skip
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="names of files or folders to leave out of input "
        "folders, e.g. site-packages '*_test.py'")  # fmt: skip
    add("--text-field", default="text", help="JSON field or Parquet column (default %(default)s)")
    add("--invalid-utf8", choices=INVALID_UTF8_POLICIES, default="error",
        help="on text that is not valid UTF-8: stop, put U+FFFD, or leave the document out")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave out rows of JSON lines and Parquet that are null, malformed or "
        "without the field, and list them in OUT/bad_rows.jsonl (default: stop at the first)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the choice of held-out documents (default %(default)s)")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--unit-bytes", type=int, help="text per unit of work (default: a 64th of the input, 1 to 128 MiB)")
    add("--shard-bytes", type=int, default=1 << 26, help="largest shard (default %(default)s)")
    add("--keep-held-out-text", action="store_true", help="also write val/documents.jsonl, for evaluation on text")
    add("--overwrite", action="store_true", help="replace the data set, or unfinished one, in --out")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = vars(parse_args(arguments))
    quiet = args.pop("quiet")
    start = time.monotonic()
    manifest = prepare_data(PrepareOptions(**args), progress=not quiet)
    seconds = time.monotonic() - start
    for name, split in manifest.splits.items():
        size = f"{split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
        cut = f"{split.samples:,} samples of {manifest.sequence_length} + 1, {split.dropped_tokens} tokens dropped"
        print(f"{name}: {size} in {cut}")
    tokens = sum(split.tokens for split in manifest.splits.values())
    left_out = f", {manifest.invalid_documents} documents left out as invalid" if manifest.invalid_documents else ""
    left_out += f", {manifest.bad_rows} bad rows left out" if manifest.bad_rows else ""
    print(f"{args['out']}: {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s{left_out}")
    return 0
