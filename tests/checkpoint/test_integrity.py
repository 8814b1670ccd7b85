"""A checkpoint that is no longer what was written: noticed, said, set aside, and the one before used instead."""

import errno
import json
import os
import re
import shutil

import pytest
import xxhash

from bov_megatron.checkpoint import manifest as manifests
from bov_megatron.checkpoint.manifest import Damage, FileEntry, Manifest
from tests.checkpoint.test_checkpoint import names, start_engine
from tests.support.distributed import run_ranks
from tests.support.runs import launch, metrics, overrides, train


def largest(folder):
    """The file with most of the tensors."""
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_byte(file):
    """Another content of the same size."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


DAMAGES = {
    "byte of a tensor": (lambda folder: flip_byte(largest(folder)), "distcp: expected checksum"),
    "tensors truncated": (lambda folder: os.truncate(largest(folder), 1000), "found 1000 bytes"),
    "tensors gone": (lambda folder: largest(folder).unlink(), "distcp: expected .* found no such file"),
    "byte of the run": (lambda folder: flip_byte(folder / "common.pt"), "common.pt: expected checksum"),
    "byte of the index": (lambda folder: flip_byte(folder / ".metadata"), ".metadata: expected checksum"),
    "byte of the manifest": (lambda folder: flip_byte(folder / "manifest.json"), "manifest.json: expected a manifest"),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: .* found none"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "manifest.json: .* found none"),
}


def falling_back_rank(rank, world_size, run_dir):
    """What is used of damaged copies of step 2 before a good step 1, and what is said; by kind of damage."""
    import contextlib
    import io

    import torch.distributed as dist

    from bov_megatron import checkpoint

    engine = start_engine(rank, world_size)
    checkpoint.save(engine, run_dir, 1, keep_last=2, extra={})
    good = checkpoint.save(engine, run_dir, 2, keep_last=2, extra={})
    assert checkpoint.newest_valid(run_dir) == good
    found = {}
    for name, (damage, _) in DAMAGES.items():
        copy = run_dir.with_name(name)
        if rank == 0:
            shutil.copytree(run_dir, copy)
            damage(copy / "checkpoints" / good.name)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            dist.barrier()
            used = checkpoint.newest_valid(copy)
        found[name] = (used.name, stderr.getvalue())
    return found


def test_the_one_before_a_damaged_one_is_used(tmp_path):
    first, second = run_ranks(falling_back_rank, 2, tmp_path / "run")
    for name, (_, said) in DAMAGES.items():
        used, text = first[name]
        assert used == second[name][0] == "step_00000001", name
        assert len(text.splitlines()) == 1 and second[name][1] == "", "one line over all ranks"
        damaged = tmp_path / name / "checkpoints" / "step_00000002"
        assert text.startswith(f"WARNING: checkpoint {damaged} is damaged: ")
        assert re.search(said, text), text
        assert names(tmp_path / name) == ["step_00000001", "step_00000002.damaged"], "nothing is deleted"


def test_a_run_goes_on_from_the_one_before(prepared_data, tmp_path):
    """To the losses of a run that nothing happened to."""
    layout = ("parallel.tensor_model_parallel_size=2", "checkpoint.interval=2", "checkpoint.keep_last=9")
    whole = overrides(prepared_data, tmp_path / "whole", *layout)
    train(2, whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    again = overrides(prepared_data, tmp_path / "damaged", *layout)
    folder = tmp_path / "damaged" / "checkpoints"
    flip_byte(largest(folder / "step_00000008"))
    (folder / "step_00000006" / "common.pt").unlink()
    (folder / "step_00000009.abcd.saving").mkdir()
    text = train(2, again)
    assert text.count("WARNING: ") == 2 and "resuming after step 4" in text
    assert metrics(tmp_path / "damaged") == metrics(tmp_path / "whole")
    kept = [f"step_{step:08d}" for step in (2, 4, 6, 6, 8, 8)]
    kept[3], kept[5] = f"{kept[3]}.damaged", f"{kept[5]}.damaged"
    assert names(tmp_path / "damaged") == kept
    for step in (2, 4, 6, 8):
        flip_byte(largest(folder / f"step_{step:08d}"))
    for _ in range(2):
        results = launch(2, again)
        assert [code for code, _ in results] == [2, 2], "nothing valid: never from the beginning by itself"
        errors = [line for _, text in results for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "has no valid checkpoint: 6 damaged set aside" in errors[0]
        assert "start another run with name=" in errors[0]
    assert len(names(tmp_path / "damaged")) == 6


def unmanifested_rank(rank, world_size, run_dir, version):
    """The newest valid checkpoint where the only one, of format `version`, has no manifest."""
    from bov_megatron import checkpoint, errors
    from bov_megatron.checkpoint import writing

    writing.FORMAT_VERSION = version
    engine = start_engine(rank, world_size)
    path = checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    writing.FORMAT_VERSION = 2
    (path / "manifest.json").unlink()
    try:
        assert checkpoint.newest_valid(run_dir) == path
    except errors.CheckpointError as error:
        return str(error)
    return checkpoint.load(engine, path).step


def test_checkpoints_older_than_manifests_are_read(tmp_path):
    assert run_ranks(unmanifested_rank, 1, tmp_path / "1", 1) == [1]
    assert "has no valid checkpoint" in run_ranks(unmanifested_rank, 1, tmp_path / "2", 2)[0]


def blind_rank(rank, world_size, run_dir):
    """The error where the second rank's node lacks the run folder."""
    from bov_megatron import checkpoint, errors
    from bov_megatron.lifecycle import run_folder

    engine = start_engine(rank, world_size)
    checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    path = run_folder.latest_checkpoint(run_dir)
    with pytest.raises(errors.CheckpointError) as error:
        checkpoint.verify(path if rank == 0 else path / "gone", True)
    return str(error.value)


def test_a_folder_that_not_all_nodes_see(tmp_path):
    """Is no reason to set a good checkpoint aside."""
    for error in run_ranks(blind_rank, 2, tmp_path):
        assert (
            re.search(r"gone does not exist \(host \S+\).*\(on rank 1\)", error)
            and "file system that all nodes share" in error
        )
    assert names(tmp_path) == ["step_00000001"]


def test_a_disk_s_error_is_damage_and_a_missing_right_is_none(folder, monkeypatch):
    def failing(number):
        def read(path):
            raise OSError(number, os.strerror(number), str(path))

        return read

    monkeypatch.setattr(manifests, "file_checksum", failing(errno.EIO))
    assert {damage.found for damage in manifests.find_damage(folder, contents=True)} == {"Input/output error"}
    monkeypatch.setattr(manifests, "file_checksum", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        manifests.find_damage(folder, contents=True)


@pytest.fixture
def folder(tmp_path):
    """A folder with three files and their manifest."""
    contents = {"a": b"12345", "b": os.urandom(2 * manifests.CHUNK_BYTES + 7), "c": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = {name: manifests.describe_file(tmp_path / name) for name in contents}
    assert files["b"] == FileEntry(len(contents["b"]), xxhash.xxh3_64(contents["b"]).hexdigest())
    manifests.write_manifest(tmp_path, Manifest(7, {"world_size": 1}, files))
    return tmp_path


def test_manifest_round_trip(folder):
    manifest = manifests.read_manifest(folder)
    assert (manifest.step, manifest.layout, set(manifest.files)) == (7, {"world_size": 1}, {"a", "b", "c"})
    assert manifest.size == 5 + manifest.files["b"].size
    assert manifests.find_damage(folder, contents=True) == []


def test_sizes_are_a_look_and_checksums_a_read(folder):
    flip_byte(folder / "b")
    assert manifests.find_damage(folder, contents=False) == []
    (damage,) = manifests.find_damage(folder, contents=True)
    assert damage.file == "b" and damage.expected != damage.found
    (folder / "a").write_bytes(b"1234")
    assert manifests.find_damage(folder, contents=False) == [Damage("a", "5 bytes", "4 bytes")]


def test_shares_cover_every_file_once(folder):
    for name in "abc":
        (folder / name).unlink()
    manifest = manifests.read_manifest(folder)
    shares = [manifests.compare(folder, manifest, True, share, 2) for share in range(2)]
    assert sorted(damage.file for share in shares for damage in share) == ["a", "b", "c"]
    assert [len(share) for share in shares] == [2, 1]


def test_a_manifest_vouches_for_itself(folder):
    path = folder / manifests.MANIFEST_FILE
    content = json.loads(path.read_text())
    content["step"] = 8
    path.write_text(json.dumps(content))
    with pytest.raises(manifests.ManifestError, match="another checksum than it states"):
        manifests.read_manifest(folder)
    for text in ("", "[]", "{}", '{"files": 3}', path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(manifests.ManifestError, match="a damaged one"):
            manifests.read_manifest(folder)
