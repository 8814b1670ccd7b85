"""nanochat's tokenizer gives the same ids as a Hugging Face one, and a pickle runs nothing."""

import io
import os
import pickle
import sysconfig
from pathlib import Path

import pytest

from bov_megatron.data.tokenizer import load_encoder
from bov_megatron.errors import ConversionError
from bov_megatron.exchange.nanochat_tokenizer import Encoding, check_same_ids, read_encoding, to_tokenizers
from bov_megatron.exchange.nanochat_tokenizer import write_tokenizer as convert
from tests.support.nanochat import PATTERN, SPECIAL_TOKENS, Calls, save_tokenizer, train_tokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
BYTES = {bytes([byte]): byte for byte in range(256)}


def texts(*packages: str) -> list[str]:
    files = [file for name in packages for file in sorted((LIBRARY / name).glob("*.py"))]
    return [file.read_text(errors="replace") for file in files]


@pytest.fixture(scope="module")
def encoding():
    return train_tokenizer(texts("json", "logging", "email"), 2048)


@pytest.fixture(scope="module")
def converted(encoding, tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), encoding)
    convert(read_encoding(folder / "tokenizer.pkl"), folder / "converted")
    return folder / "converted"


def test_ids_are_those_of_tiktoken_on_other_text(encoding, converted):
    encoder = load_encoder(converted)
    corpus = texts("asyncio", "unittest", "encodings", "idlelib")
    assert sum(map(len, corpus)) > 2_000_000
    for text, ids in zip(corpus, encoder.encode(corpus), strict=True):
        assert ids.tolist() == encoding.encode_ordinary(text)


def test_ids_are_those_of_tiktoken_for_characters_of_every_kind(encoding, converted):
    encoder = load_encoder(converted)
    # All of the planes that have scripts and symbols, the edges of the one that has only ideographs, and marks.
    codes = [*range(0xD800), *range(0xE000, 0x20100), *range(0x2A600, 0x2A800), *range(0xE0000, 0xE0200)]
    # Between letters, between digits, twice, and before a line break.
    text = "".join(f"a{c}b1{c}2{c}{c}\n" for c in map(chr, codes))
    assert encoder.fast.encode(text, add_special_tokens=False).ids == encoding.encode_ordinary(text)


def test_special_tokens_keep_their_ids_and_text_cannot_spell_them(encoding, converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = {token: encoding.encode_single_token(token) for token in SPECIAL_TOKENS}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} == ids
    assert (tokenizer.bos_token, len(tokenizer)) == ("<|bos|>", 2048)
    encoder = load_encoder(converted)
    assert (encoder.bos_token_id, encoder.vocab_size) == (ids["<|bos|>"], 2048)
    (spelled,) = encoder.encode(["<|bos|><|user_start|>"])
    assert not set(ids.values()) & set(spelled.tolist())
    text = "Größe 日本 🙂\r\n"
    assert tokenizer.decode(encoding.encode_ordinary(text), skip_special_tokens=True) == text


def with_state(state) -> bytes:
    """A pickle of an Encoding with a state of our choice."""
    import copyreg

    import tiktoken

    out = io.BytesIO()
    pickler = pickle.Pickler(out)
    pickler.dispatch_table = {tiktoken.Encoding: lambda _: (copyreg.__newobj__, (tiktoken.Encoding,), state)}
    pickler.dump(tiktoken.Encoding.__new__(tiktoken.Encoding))
    return out.getvalue()


def good_state(**changes) -> dict:
    special = {"<|bos|>": 256}
    return {"name": "n", "pat_str": PATTERN, "mergeable_ranks": BYTES, "special_tokens": special, **changes}


def test_a_pickle_runs_nothing(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "tokenizer.pkl"
    harmful = Calls(os.mkdir, str(marker))
    for content in (pickle.dumps(harmful), with_state(good_state(name=harmful)), pickle.dumps(harmful, protocol=0)):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"refused: it asks for posix\.mkdir, which no tokenizer needs"):
            read_encoding(path)
        assert not marker.exists()
        pickle.loads(content)
        assert marker.exists(), "the pickle would have run it"
        marker.rmdir()


BAD = {
    "not an encoding": (pickle.dumps({"pat_str": "x"}), "is not a pickled tiktoken Encoding: it lacks"),
    "another class": (pickle.dumps(Path("x")), "it asks for pathlib"),
    "cut off": (with_state(good_state())[:-40], "is not a pickled tiktoken Encoding, and was refused"),
    "empty": (b"", "was refused: Ran out of input"),
    "a name": (with_state("cl100k_base"), "only names tiktoken's encoding 'cl100k_base'"),
    "ranks of text": (with_state(good_state(mergeable_ranks={"a": 1})), "it lacks pat_str, mergeable_ranks"),
    "a state that lacks": (with_state({"name": "n"}), "it lacks pat_str, mergeable_ranks"),
    "an id twice": (with_state(good_state(special_tokens={"<|bos|>": 255})), "two of its tokens have the same id"),
    "no beginning": (with_state(good_state(special_tokens={"<|end|>": 256})), "none of <|bos|>, <|endoftext|>"),
    "a byte without token": (
        with_state(good_state(mergeable_ranks={token: rank for token, rank in BYTES.items() if rank != 65})),
        "it has no token for 1 of the 256 bytes, e.g. 65",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_tokenizer_is_refused(case, tmp_path):
    content, message = BAD[case]
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(ConversionError) as error:
        read_encoding(tmp_path / "tokenizer.pkl")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tokenizers_without_an_equal_are_refused(tmp_path):
    def refused(message, **changes):
        state = good_state(special_tokens={"<|bos|>": 1000}, **changes)
        made = Encoding(tmp_path, state["pat_str"], state["mergeable_ranks"], state["special_tokens"])
        with pytest.raises(ConversionError, match=message):
            check_same_ids(to_tokenizers(made), made)

    refused(r"its token b'the' is no merge of two earlier ones", mergeable_ranks={**BYTES, b"the": 256})
    refused(r"its pattern can't be used by tokenizers", pat_str="(")
    # tiktoken drops what a pattern doesn't match, tokenizers keep it.
    refused(r"it would give other ids than tiktoken", pat_str=r"\w+|\s+")
    # tiktoken never gives back what `{1,2}+` has taken; tokenizers read it as a repetition.
    merges = {**BYTES, b"  ": 256}
    refused(r"it would give other ids than tiktoken", pat_str=r"\s{1,2}+\s|[\s\S]", mergeable_ranks=merges)
