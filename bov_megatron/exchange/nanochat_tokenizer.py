"""nanochat's tokenizer, a pickled tiktoken Encoding that rustbpe trained, as a Hugging Face one with the same ids."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bov_megatron.data.tokenizer import save_tokenizer
from bov_megatron.errors import ConversionError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.pkl"
BOS_TOKENS = ("<|bos|>", "<|endoftext|>")
"""What opens documents: nanochat's own, or that of OpenAI's tokenizers."""
SAMPLE = (
    "It's  the 1st of 12,345 tests: WE'LL see, they've said\t\"don't\"…  \r\n\r\n   def f(x):\n        return x != 7\n"
    "Größe, naïve Ångström, İstanbul; Привет, мир! Ελλάδα 日本語の文章、中文字符。한국어 ภาษาไทย हिन्दी עברית العربية\n"
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 ½ ² Ⅷ e\u0301\u00a0\u2028\u3000x 'ſ 'S 'LL ''' --- ### /**\n"
    "<|bos|> <|user_start|> http://a.b/c?d=e&f \x00\x7f\ufeff\n\n\n\t\t end"
)


@dataclass(frozen=True)
class Encoding:
    """What makes a tiktoken Encoding. Raises ConversionError unless it is one that can be converted."""

    path: Path
    pattern: str
    """Regular expression that cuts text into words."""
    ranks: dict[bytes, int]
    """Id of each token, which is also the order of merges."""
    special: dict[str, int]

    def __post_init__(self):
        ids = [*self.ranks.values(), *self.special.values()]
        if len(set(ids)) != len(ids) or min(ids, default=-1) < 0:
            raise ConversionError(f"{self.path}: two of its tokens have the same id, or one has none")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise ConversionError(
                f"{self.path}: it has no token for {len(missing)} of the 256 bytes, e.g. {missing[0]}"
            )
        if not set(BOS_TOKENS) & self.special.keys():
            raise ConversionError(f"{self.path}: it has none of {', '.join(BOS_TOKENS)}, one of which opens documents")

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return max(*self.ranks.values(), *self.special.values()) + 1

    @property
    def bos_token(self) -> str:
        return next(token for token in BOS_TOKENS if token in self.special)


class _State:
    """Stands in for tiktoken's class in a pickle: keeps the state, runs nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows one name, tiktoken's Encoding, and refuses all others: a pickle may call whatever it can name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _State
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")


def read_encoding(path: Path) -> Encoding:
    """Read a tokenizer.pkl without running anything in it. Raises ConversionError."""
    try:
        with path.open("rb") as file:
            loaded = _Unpickler(file).load()
    except OSError as error:
        raise ConversionError(f"{path} can't be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ConversionError(f"{path} is not a pickled tiktoken Encoding, and was refused: {error}") from None
    state = loaded.state if type(loaded) is _State else None
    if isinstance(state, str):
        raise ConversionError(f"{path} only names tiktoken's encoding {state!r}, whose tokens are not in the file")
    fields = ("pat_str", "mergeable_ranks", "special_tokens")
    values: Any = [state.get(field) if isinstance(state, dict) else None for field in fields]
    pattern, ranks, special = values
    if not (isinstance(pattern, str) and _maps(ranks, bytes) and _maps(special, str)):
        raise ConversionError(f"{path} is not a pickled tiktoken Encoding: it lacks {', '.join(fields)}")
    return Encoding(path, pattern, ranks, special)


def _maps(values: Any, kind: type) -> bool:
    """Whether `values` maps `kind` to whole numbers."""
    return isinstance(values, dict) and all(type(key) is kind and type(value) is int for key, value in values.items())


def write_tokenizer(encoding: Encoding, out: Path) -> None:
    """Write the Hugging Face tokenizer. Raises ConversionError if it would not give the same ids."""
    fast = to_tokenizers(encoding)
    check_same_ids(fast, encoding)
    save_tokenizer(fast, out, encoding.bos_token)


def to_tokenizers(encoding: Encoding) -> Tokenizer:
    """The tokenizer in Hugging Face's form. Raises ConversionError where there is none."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    spelled = {token: "".join(map(_alphabet().__getitem__, token)) for token in encoding.ranks}
    merges = [
        tuple(spelled[part] for part in _parts(token, encoding))
        for token in sorted(encoding.ranks, key=encoding.ranks.__getitem__)
        if len(token) > 1
    ]
    if taken := encoding.special.keys() & set(spelled.values()):
        raise ConversionError(f"{encoding.path}: {sorted(taken)[0]!r} is a special token and an ordinary one")
    # Special tokens too, so that they keep their ids; no merge makes them.
    vocabulary = {spelled[token]: index for token, index in encoding.ranks.items()} | encoding.special
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False, unk_token=None, fuse_unk=False))
    try:
        splitter = pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated")
    except Exception as error:  # the library raises plain Exception
        raise ConversionError(f"{encoding.path}: its pattern can't be used by tokenizers: {error}") from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    fast.decoder = decoders.ByteLevel()
    by_id = sorted(encoding.special, key=encoding.special.__getitem__)
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in by_id])
    return fast


def _parts(token: bytes, encoding: Encoding) -> list[bytes]:
    """The two tokens that `token` is a merge of: what is left of its bytes after all merges that come before it."""
    # tiktoken merges any neighbours whose bytes together are a token. Until a token's turn comes, only earlier merges
    # have happened inside it, the same ones in every text, so that it is always made of the same two parts.
    ranks = encoding.ranks
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, place = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank >= ranks[token]:
            raise ConversionError(f"{encoding.path}: its token {token!r} is no merge of two earlier ones")
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


@functools.cache
def _alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer: itself if it can be seen, else from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def check_same_ids(fast: Tokenizer, encoding: Encoding) -> None:
    """Raise ConversionError unless tiktoken gives the same ids for SAMPLE, and for all tokens in random order."""
    import tiktoken

    try:
        reference = tiktoken.Encoding(
            "nanochat",
            pat_str=encoding.pattern,
            mergeable_ranks=encoding.ranks,
            special_tokens=encoding.special,
        )
    except Exception as error:  # the library raises plain ValueError, or panics
        raise ConversionError(f"{encoding.path}: tiktoken refuses it: {error}") from None
    tokens = [token.decode(errors="replace") for token in encoding.ranks]
    random.Random(0).shuffle(tokens)
    fast.encode_special_tokens = True  # as text, like encode_ordinary
    for text in (SAMPLE, "".join(tokens)):
        expected = reference.encode_ordinary(text)
        found = fast.encode(text, add_special_tokens=False).ids
        if found != expected:
            place = next(i for i, pair in enumerate(itertools.zip_longest(found, expected)) if pair[0] != pair[1])
            there = reference.decode(expected[max(0, place - 3) : place + 3])
            raise ConversionError(
                f"{encoding.path}: converted, it would give other ids than tiktoken, e.g. for {there!r}, so it was not"
            )
    fast.encode_special_tokens = False
