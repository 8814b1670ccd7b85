"""Bits per byte: the definition, cutting documents into windows, and packed samples."""

import math

import numpy as np
import pytest
import torch

from bov_megatron.data.prepare import PrepareOptions, prepare_data
from bov_megatron.data.tokenizer import load_bytes_per_token, load_encoder, train_tokenizer
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.bits_per_byte import score_samples, write_rolling_task
from bov_megatron.evaluation.report import evaluate
from bov_megatron.evaluation.target import find_target
from tests.evaluation.conftest import SEQUENCE_LENGTH, VOCAB
from tests.support.tiny_tokenizer import STDLIB


def held_out_documents():
    return [(STDLIB / f"{name}.py").read_text() for name in ("bisect", "keyword", "abc")]


def packed_samples(folder, count):
    """A stream of documents cut into samples, as data preparation packs them."""
    encoder = load_encoder(folder)
    stream = np.concatenate([[encoder.bos_token_id, *ids] for ids in encoder.encode(held_out_documents())])
    length = SEQUENCE_LENGTH + 1
    return [stream[i * length : (i + 1) * length].astype(np.uint16) for i in range(count)]


def bits_per_byte_by_hand(model, folder, samples):
    """Token by token, from the definition; bytes from decoding whole samples, not from a table."""
    encoder = load_encoder(folder)
    nats = size = 0
    for sample in samples:
        ids = torch.tensor(sample.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None, :-1]).logits[0].double(), -1)
        targets = ids[1:].tolist()
        nats -= sum(float(logprobs[i, t]) for i, t in enumerate(targets) if t != encoder.bos_token_id)
        size += len(encoder.fast.decode(targets, skip_special_tokens=True).encode())
    return nats / math.log(2) / size


def test_special_tokens_count_neither_nats_nor_bytes(exported):
    folder, model = exported
    samples = packed_samples(folder, 40)
    assert sum((sample[1:] == load_encoder(folder).bos_token_id).sum() for sample in samples) > 0
    found = score_samples(model, samples, load_bytes_per_token(folder), batch_size=7)
    assert found.value == pytest.approx(bits_per_byte_by_hand(model, folder, samples), rel=1e-6)


def test_packed_shards_score_as_their_samples(exported, tmp_path):
    from streaming import MDSWriter

    folder, model = exported
    samples = packed_samples(folder, 10)
    columns = {"tokens": f"ndarray:uint16:{SEQUENCE_LENGTH + 1}"}
    with MDSWriter(out=str(tmp_path / "val"), columns=columns) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
    report = evaluate(find_target(folder), packed=tmp_path / "val", limit=6, batch_size=4, device="cpu")
    expected = score_samples(model, samples[:6], load_bytes_per_token(folder))
    assert report["scores"]["packed"]["bits_per_byte"] == pytest.approx(expected.value, rel=1e-6)
    assert report["samples"]["packed"] == 6


def test_packed_samples_of_another_tokenizer_are_refused(exported, tmp_path):
    """Their ids are within the vocabulary, and a score of them would look like any other."""
    folder, _ = exported
    (tmp_path / "a.py").write_text((STDLIB / "bisect.py").read_text() * 3)
    tokenizers = {"own": folder, "other": tmp_path / "other"}
    train_tokenizer(
        [str(STDLIB / "keyword.py"), str(STDLIB / "abc.py")], tokenizers["other"], VOCAB - 40, progress=False
    )
    for name, tokenizer in tokenizers.items():
        sizes = dict(sequence_length=SEQUENCE_LENGTH, validation_fraction=0.0, workers=1)
        prepare_data(
            PrepareOptions([str(tmp_path / "a.py")], str(tokenizer), str(tmp_path / f"{name}-data"), **sizes), False
        )
    with pytest.raises(EvaluationError, match=r"train was made with tokenizer \w{12}, the model with \w{12}: "):
        evaluate(find_target(folder), packed=tmp_path / "other-data" / "train", device="cpu")
    report = evaluate(find_target(folder), packed=tmp_path / "own-data" / "train", limit=2, device="cpu")
    assert report["samples"]["packed"] == 2


def test_documents_are_cut_into_windows_without_loss(exported, tmp_path):
    import json

    folder, _ = exported
    documents = [*held_out_documents(), "one line of " + "x€" * 200, "short", "", "a <|bos|> inside"]
    task = write_rolling_task(documents, folder, SEQUENCE_LENGTH, tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert "".join(texts) == "".join(documents[:-1]) and task.skipped == 1
    encoder = load_encoder(folder)
    assert task.samples.shape == (len(texts), SEQUENCE_LENGTH + 1)
    for text, sample, ids in zip(texts, task.samples, encoder.encode(texts), strict=True):
        assert text and 0 < len(ids) <= SEQUENCE_LENGTH
        assert sample.tolist() == [0, *ids] + [0] * (SEQUENCE_LENGTH - len(ids))
    # Cut at line ends where lines fit, and filled well.
    assert sum(text.endswith("\n") for text in texts) > 0.7 * len(texts)
    assert np.mean([len(ids) for ids in encoder.encode(texts)]) > 0.7 * SEQUENCE_LENGTH
    assert len(write_rolling_task(documents, folder, SEQUENCE_LENGTH, tmp_path, max_windows=5).samples) == 5


def test_what_cannot_be_scored_is_refused(exported, tmp_path):
    folder, model = exported
    sizes = load_bytes_per_token(folder)
    with pytest.raises(EvaluationError, match=f"holds id {VOCAB + 3}, but the model has {VOCAB} ids"):
        score_samples(model, [np.array([0, 5, VOCAB + 3])], sizes)
    with pytest.raises(EvaluationError, match="no text to score"):
        score_samples(model, [np.array([0, 0, 0])], sizes)
    with pytest.raises(EvaluationError, match="no document can be scored: 1 spell a special token"):
        write_rolling_task(["<|bos|>", ""], folder, SEQUENCE_LENGTH, tmp_path)
    with pytest.raises(EvaluationError, match=r"has no index\.json; give a folder of MDS shards"):
        evaluate(find_target(folder), packed=tmp_path)
    with pytest.raises(EvaluationError, match=r"is neither an export \(no config\.json\) nor a run folder"):
        find_target(tmp_path)
    with pytest.raises(EvaluationError, match=r"--limit 0\.5 with --packed: .* need a whole number"):
        evaluate(find_target(folder), packed=tmp_path, limit=0.5)
