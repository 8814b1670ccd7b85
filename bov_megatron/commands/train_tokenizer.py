"""Train a byte-level BPE tokenizer on text, JSON lines or Parquet, and save it in Hugging Face's format.

    bov train-tokenizer corpus/ --vocab-size 32768 --out tokenizers/mine

The folder opens with AutoTokenizer.from_pretrained(OUT), offline. bytes_per_token.json beside it gives the UTF-8 bytes
of every id. The same input gives the same tokenizer. A run of letters, punctuation or spaces longer than 256 characters
is cut into words of 256, in training and, as tokenizer.json says so, wherever the tokenizer is used.
"""

import argparse
import time

from bov_megatron.data.corpus import INVALID_UTF8_POLICIES
from bov_megatron.data.tokenizer import train_tokenizer


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bov train-tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob: text (.txt, .md, .py, …: one "
                        "document each), .jsonl (also .gz .bz2 .xz .zst), .parquet")  # fmt: skip
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=32768, help="ids, <|bos|> included (default %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=2_000_000_000, help="read at most this much text, evenly over "
                        "the inputs (default %(default)s)")  # fmt: skip
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="names of files or folders to "
                        "leave out of input folders, e.g. site-packages '*_test.py'")  # fmt: skip
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column (default %(default)s)")
    parser.add_argument("--invalid-utf8", choices=INVALID_UTF8_POLICIES, default="error",
                        help="what to do with text that is not valid UTF-8 (default %(default)s)")  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows of JSON lines and Parquet that are "
                        "null, malformed or without the field (default: stop at the first)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there already")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    start = time.monotonic()
    encoder = train_tokenizer(
        args.inputs,
        args.out,
        vocab_size=args.vocab_size,
        max_bytes=args.max_bytes,
        text_field=args.text_field,
        invalid_utf8=args.invalid_utf8,
        skip_bad=args.skip_bad,
        exclude=args.exclude,
        progress=not args.quiet,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {encoder.vocab_size} ids, hash {encoder.hash[:12]}, {time.monotonic() - start:.1f} s")
    return 0
