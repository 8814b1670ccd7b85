import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from bov_megatron.data import cache as cache_module
from bov_megatron.data.loader import TrainLoader, ValidationLoader
from bov_megatron.data.manifest import read_manifest
from bov_megatron.data.shards import DataSet, open_data_sets
from bov_megatron.data.tokenizer import train_tokenizer
from bov_megatron.errors import DataError, RecipeError
from bov_megatron.recipe import DataConfig, StreamConfig
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, prepare
from tests.data.test_prepare import stored_tokens


def train_loader(data, **options):
    if not isinstance(data, DataConfig):
        data = DataConfig(path=str(data), num_workers=0, shuffle_block_size=300)
    return TrainLoader(
        data,
        **{
            "sequence_length": SEQUENCE_LENGTH,
            "vocab_size": VOCAB_SIZE,
            "global_batch_size": 24,
            "micro_batch_size": 3,
            **options,
        },
    )


def validation_loader(data, **options):
    sizes = {"sequence_length": SEQUENCE_LENGTH, "vocab_size": VOCAB_SIZE, "micro_batch_size": 4, "tokens": 10**9}
    return ValidationLoader(DataConfig(path=str(data)), **{**sizes, **options})


def take(loader, steps):
    with loader:
        return [next(loader) for _ in range(steps)]


def joined(batch):
    return torch.cat(batch.micro_batches)


def test_batches_are_the_stored_samples_named_by_their_ids(data_folder):
    stored = stored_tokens(data_folder, "train")
    assert len(DataSet(data_folder).split("train").shard_sizes) > 8
    seen = Counter()
    for batch in take(train_loader(data_folder), 150):
        assert [tuple(m.shape) for m in batch.micro_batches] == [(3, SEQUENCE_LENGTH + 1)] * 8
        assert batch.micro_batches[0].dtype == torch.int64
        assert (joined(batch).numpy() == stored[batch.ids_B2[:, 1]]).all()
        seen.update(batch.ids_B2[:, 1].tolist())
    passes = 150 * 24 / len(stored)
    assert passes > 1 and {int(passes), int(passes) + 1} == set(seen.values()) and len(seen) == len(stored)


@pytest.mark.parametrize("canonical_nodes", [1, 2])
def test_every_data_parallel_size_sees_the_same_batches(data_folder, canonical_nodes):
    data = DataConfig(path=str(data_folder), num_workers=0, num_canonical_nodes=canonical_nodes)
    whole = take(train_loader(data), 40)
    for size in (2, 4, 8):
        ranks = [take(train_loader(data, data_parallel_rank=r, data_parallel_size=size), 40) for r in range(size)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([joined(rank[step]) for rank in ranks]), joined(batch))
            assert {rank[step].digest for rank in ranks} == {batch.digest}
    assert len({batch.digest for batch in whole}) == 40


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_at_any_step_goes_on_exactly(data_folder, workers):
    data = DataConfig(path=str(data_folder), num_workers=workers, prefetch_factor=5, shuffle_block_size=100)
    whole = take(train_loader(data), 130)
    for start in (0, 1, 57, 128):  # 57 lies at an epoch's border, within a batch
        resumed = take(train_loader(data, start_step=start), 2)
        for batch, expected in zip(resumed, whole[start:], strict=False):
            assert batch.place == expected.place and batch.digest == expected.digest
            assert torch.equal(joined(batch), joined(expected))


def test_streams_are_mixed_by_weight(data_folder, other_data_folder):
    streams = [StreamConfig(str(data_folder), weight=3), StreamConfig(str(other_data_folder), weight=1)]
    stored = [stored_tokens(data_folder, "train"), stored_tokens(other_data_folder, "train")]
    loader = train_loader(DataConfig(streams=streams))
    drawn = Counter()
    for batch in take(loader, 100):
        for row, (stream, sample) in zip(joined(batch).numpy(), batch.ids_B2, strict=True):
            assert (row == stored[stream][sample]).all()
            drawn[int(stream)] += 1
        assert abs(drawn[1] - sum(drawn.values()) / 4) < 1
    assert drawn[1] == 600


def test_validation_counts_every_sample_once_on_any_number_of_ranks(data_folder):
    stored = stored_tokens(data_folder, "val")
    assert len(stored) % 3 or len(stored) % 4, "must not divide evenly"
    for size in (1, 2, 3, 4):
        loaders = [validation_loader(data_folder, data_parallel_rank=r, data_parallel_size=size) for r in range(size)]
        assert len({len(loader) for loader in loaders}) == 1
        for _ in range(2):
            batches = [batch for loader in loaders for batch in loader]
            assert len(batches) == size * len(loaders[0]) and all(b.tokens.shape[0] == 4 for b in batches)
            assert (torch.cat([b.tokens[b.mask] for b in batches]).numpy() == stored).all()
    limited = validation_loader(data_folder, tokens=5 * SEQUENCE_LENGTH + 3)
    assert sum(int(b.mask.sum()) for b in limited) == 5
    assert (torch.cat([b.tokens[b.mask] for b in limited]).numpy() == stored[:5]).all()


def test_bytes_per_token_come_with_the_data(data_folder):
    lengths = validation_loader(data_folder).bytes_per_token()
    text = DataSet(data_folder)
    tokens = stored_tokens(data_folder, "val")[0]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(text.tokenizer_folder / "tokenizer.json"))
    assert len(tokenizer.decode(tokens.tolist()).encode()) == int(lengths[torch.from_numpy(tokens).long()].sum())


@pytest.fixture
def copy(data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "copy")
    return tmp_path / "copy"


def edit_manifest(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def test_data_that_does_not_fit_the_model_is_refused(data_folder, other_data_folder, library, tmp_path):
    with pytest.raises(DataError, match=f"packed for sequence_length {SEQUENCE_LENGTH}, model.sequence_length is 256"):
        train_loader(data_folder, sequence_length=256)
    with pytest.raises(DataError, match="vocabulary of 2048, model.vocab_size is 1000; set model.vocab_size=2048"):
        train_loader(data_folder, vocab_size=1000)
    with pytest.raises(DataError, match="the checkpoint with abc"):
        train_loader(data_folder, tokenizer_hash="abc")
    with pytest.raises(RecipeError, match="global_batch_size=24 is not a multiple of .*=5 × 1 data-parallel ranks"):
        train_loader(data_folder, micro_batch_size=5)
    with pytest.raises(DataError, match="data_parallel_rank 2"):
        train_loader(data_folder, data_parallel_rank=2, data_parallel_size=2)
    train_tokenizer([str(library / "email")], tmp_path / "t", vocab_size=500, progress=False)
    prepare([library / "json"], tmp_path / "t", tmp_path / "d", validation_fraction=0.0)
    streams = [StreamConfig(str(path)) for path in (data_folder, other_data_folder, tmp_path / "d")]
    assert len(open_data_sets(DataConfig(streams=streams[:2]), SEQUENCE_LENGTH, VOCAB_SIZE)) == 2
    with pytest.raises(DataError, match="d was made with tokenizer .*, data set .* must use the same one"):
        train_loader(DataConfig(streams=streams))
    with pytest.raises(DataError, match="no 'val' split; prepare it again with --validation-fraction"):
        ValidationLoader(
            DataConfig(path=str(tmp_path / "d")),
            tokens=10**6,
            sequence_length=SEQUENCE_LENGTH,
            vocab_size=VOCAB_SIZE,
            micro_batch_size=1,
        )
    with pytest.raises(DataError, match="validation.tokens=100 is less than one sample of 128"):
        validation_loader(data_folder, tokens=100)


def test_recipes_without_usable_data_are_refused(data_folder, tmp_path):
    with pytest.raises(DataError, match="data.path is not set"):
        train_loader(DataConfig())
    with pytest.raises(DataError, match="both set"):
        train_loader(DataConfig(path="x", streams=[StreamConfig("y")]))
    with pytest.raises(DataError, match=r"data.streams\[1\].path is not set"):
        train_loader(DataConfig(streams=[StreamConfig(str(data_folder)), StreamConfig()]))
    with pytest.raises(DataError, match="does not exist; prepare it"):
        train_loader(tmp_path / "nowhere")
    (tmp_path / "raw.jsonl").write_text('{"text": "raw"}')
    with pytest.raises(DataError, match="raw.jsonl is a file, not a data set; make one of text with `bov prepare-data"):
        train_loader(tmp_path / "raw.jsonl")
    with pytest.raises(DataError, match="holds no data set: it has no manifest.json; make one of text"):
        train_loader(tmp_path)


def test_damaged_data_sets_are_refused(copy):
    shards = sorted((copy / "train").rglob("*.mds"))
    size = shards[3].stat().st_size
    os.truncate(shards[3], size - 1)
    with pytest.raises(DataError, match=rf"{shards[3].name} has {size - 1} bytes, expected {size} bytes; copy it"):
        take(train_loader(copy), 60)
    shards[3].unlink()
    with pytest.raises(DataError, match=rf"{shards[3].name} is missing, expected {size} bytes"):
        take(train_loader(DataConfig(path=str(copy), num_workers=2)), 60)
    (copy / "train/index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(DataError, match="index.json is not the one that manifest.json describes"):
        train_loader(copy)
    (copy / "train/index.json").unlink()
    with pytest.raises(DataError, match="index.json is missing"):
        train_loader(copy)
    edit_manifest(copy, format_version=99)
    with pytest.raises(DataError, match="format_version 99"):
        train_loader(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a data set's manifest"):
        train_loader(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest.json, so it is not complete"):
        train_loader(copy)


def test_a_flipped_byte_is_found_when_a_shard_is_first_read(copy):
    """Tokens that are tokens: nothing but the index's hash could tell."""
    shard = sorted((copy / "train").rglob("*.mds"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: its xxh64 differs from the index's; copy it again"):
        take(train_loader(copy), 60)


@pytest.mark.parametrize("fault", ["gone", "cut off", "emptied"])
def test_a_shard_lost_while_it_is_read_from(copy, tmp_path, fault):
    """Local data end the run and say so; a cache is filled again."""
    remote = DataConfig(path=str(tmp_path / "cache"), remote=str(copy), num_workers=0)
    for data, name in ((DataConfig(path=str(copy), num_workers=0), "copy"), (remote, "cache")):
        split = DataSet(data.path, data.remote).split("train")
        before = split.read(np.arange(split.num_samples))
        shard = split._path(0)
        content = shard.read_bytes()
        if fault == "gone":
            shard.unlink()
        else:
            os.truncate(shard, 0 if fault == "emptied" else len(content) - 2)
        if name == "cache":
            assert np.array_equal(split.read(np.arange(split.num_samples)), before)
        else:
            with pytest.raises(DataError, match=rf"{shard} (is missing|has \d+ bytes), expected {len(content)} bytes"):
                split.read(np.arange(split.num_samples))
        shard.write_bytes(content)


def test_ids_beyond_the_vocabulary_are_refused(copy):
    edit_manifest(copy, vocab_size=1000)
    with pytest.raises(DataError, match=r"shard.\d+.mds: sample \d+ holds id \d+, beyond the vocabulary of 1000"):
        take(train_loader(copy), 60)


def test_remote_data_arrives_as_needed_and_equals_local(data_folder, tmp_path):
    remote = DataConfig(path=str(tmp_path / "cache"), remote=str(data_folder), shuffle_block_size=50)
    local = DataConfig(path=str(data_folder), shuffle_block_size=50)
    loader = train_loader(remote)
    total = len(DataSet(data_folder).split("train").shard_sizes)
    first = next(loader)
    loader.close()
    arrived = len(list((tmp_path / "cache").rglob("*.mds")))
    assert 0 < arrived < total, "only the first batches' shards and the next block's"
    assert first.digest == take(train_loader(local), 1)[0].digest
    for a, b in zip(take(train_loader(remote), 130), take(train_loader(local), 130), strict=True):
        assert a.digest == b.digest and torch.equal(joined(a), joined(b))
    assert len(list((tmp_path / "cache/train").rglob("*.mds"))) == total
    batches = ValidationLoader(
        remote, tokens=10**9, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE, micro_batch_size=4
    )
    assert sum(int(batch.mask.sum()) for batch in batches) == read_manifest(data_folder).splits["val"].samples


def read_everything(folder, remote, barrier, results):
    barrier.wait()
    split = DataSet(folder, remote).split("train")
    results.put(split.read(np.arange(split.num_samples)).sum())


def test_processes_share_a_cache(data_folder, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    arguments = (tmp_path / "cache", str(data_folder), barrier, results)
    processes = [context.Process(target=read_everything, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {int(results.get()) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {int(stored_tokens(data_folder, "train").astype(np.int64).sum())}
    assert not list((tmp_path / "cache/.incoming").iterdir())


def test_a_killed_download_leaves_nothing_to_be_believed(copy, tmp_path):
    """A shard of 300 MB (mostly a hole) takes long enough to be killed in the middle."""
    name = "train/big.mds"
    with open(copy / name, "wb") as file:
        file.truncate(300_000_000)
    cache = DataSet(tmp_path / "cache", str(copy)).cache
    process = multiprocessing.get_context("fork").Process(target=cache.get, args=(name, 300_000_000))
    process.start()
    incoming = tmp_path / "cache/.incoming"
    while not [path for path in incoming.rglob("file*") if path.stat().st_size > 0] and process.is_alive():
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode < 0 and list(incoming.rglob("file*")), "must be killed in the middle"
    assert not (tmp_path / "cache" / name).exists()
    assert cache.get(name, 300_000_000).stat().st_size == 300_000_000
    assert not list(incoming.iterdir())
    os.truncate(tmp_path / "cache" / name, 999)  # as another program may leave it
    assert cache.get(name, 300_000_000).stat().st_size == 300_000_000


@pytest.fixture
def outage(copy, tmp_path, monkeypatch):
    """A cache whose next downloads fail, as many as the list has errors (tests/faults has a real server's outages)."""
    errors = []
    real = cache_module.Cache._download

    def download(self, name, file):
        if errors:
            raise errors.pop()
        real(self, name, file)

    monkeypatch.setattr(cache_module.Cache, "_download", download)
    monkeypatch.setattr(cache_module, "FIRST_WAIT_SECONDS", 0.01)
    return cache_module.Cache(tmp_path / "cache", str(copy)), errors


def test_a_home_out_of_reach_is_tried_again(outage, capsys):
    cache, errors = outage
    errors += [ConnectionResetError("cut off")] * 3
    assert json.loads(cache.get("train/index.json").read_text())
    said = capsys.readouterr().err
    assert said.count("is out of reach (ConnectionResetError: cut off); trying again for") == 1
    assert "train/index.json is back, after" in said and not errors


def test_what_cannot_get_better_is_not_tried_again(outage):
    cache, errors = outage
    refused = RuntimeError()
    refused.response = {"ResponseMetadata": {"HTTPStatusCode": 403}}
    for error, reason in ((refused, "HTTP status 403"), (FileNotFoundError("x"), "FileNotFoundError: x")):
        errors[:] = [error]
        with pytest.raises(DataError, match=f"can't fetch .*/train/index.json: .*{reason}"):
            cache.get("train/index.json")
        assert not errors
    assert not list((cache.folder / ".incoming").iterdir())


def test_waiting_ends_with_patience_or_with_the_run(outage, monkeypatch):
    cache, errors = outage
    errors += [ConnectionResetError("cut off")] * 1000
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(DataError, match="can't fetch .*ConnectionResetError: cut off.*start again to go on"):
        cache.get("train/index.json")
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 600.0)
    threading.Timer(0.2, cache.close).start()
    started = time.monotonic()
    with pytest.raises(DataError, match="given up, as the run ends"):
        cache.get("train/index.json")
    assert time.monotonic() - started < 30


def test_bad_remotes_are_refused(copy, data_folder, tmp_path):
    def loader(remote, cache):
        return train_loader(DataConfig(path=str(tmp_path / cache), remote=str(remote), num_workers=0))

    with pytest.raises(DataError, match="can't fetch /nowhere/manifest.json: FileNotFoundError"):
        loader("/nowhere", "a")
    with pytest.raises(DataError, match="can't fetch gopher://x/manifest.json: ValueError: Unsupported remote path"):
        loader("gopher://x", "b")
    with pytest.raises(DataError, match="are the same folder"):
        loader(tmp_path / "copy", "copy")
    take(loader(copy, "c"), 1)
    shard = sorted((copy / "train").rglob("*.mds"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: its xxh64 differs from the index's; upload"):
        take(loader(copy, "d"), 60)
    assert not list((tmp_path / "d").rglob(f"{shard.parent.name}/{shard.name}"))
    edit_manifest(copy, seed=5)
    with pytest.raises(DataError, match="holds another data set than .* delete the cache folder"):
        loader(copy, "c")
