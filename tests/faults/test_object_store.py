"""Training data in an object store that fails: moto's S3 server on loopback, read with streaming's own downloader."""

import signal
import time

import pytest

from tests.support.launcher import Launch
from tests.support.object_store import BUCKET, ObjectStore
from tests.support.results import lines_of, same_as, wait_until
from tests.support.runs import overrides, train

STEPS = [
    "train.steps=24",
    "train.global_batch_size=16",
    "validation.interval=0",
    "checkpoint.interval=4",
    # Few steps a shard and little read ahead: the run needs the store again and again.
    "data.shuffle_block_size=1",
    "data.prefetch_factor=1",
]


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    """The same steps from a local folder."""
    folder = tmp_path_factory.mktemp("local")
    train(2, overrides(prepared_data, folder, *STEPS))
    return folder


@pytest.fixture
def store(prepared_data, tmp_path):
    running = ObjectStore(prepared_data.folder, tmp_path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def start(prepared_data, tmp_path, store):
    def launch(name: str, *changes: str, prepare=None, prepare_arguments=(), **environ: str) -> Launch:
        remote = [f"data.path={tmp_path}/cache", f"data.remote=s3://{BUCKET}/set"]
        arguments = overrides(prepared_data, tmp_path / "run", *STEPS, *remote, *changes)
        return Launch(2, arguments, tmp_path / name, prepare, prepare_arguments, store.environ() | environ)

    return launch


def short_patience(rank: int, seconds: float) -> None:
    from bov_megatron.data import cache

    cache.PATIENCE_SECONDS = seconds


def shards_in(cache) -> int:
    return len(list((cache / "train").rglob("*.mds"))) + len(list((cache / "val").rglob("*.mds")))


def test_it_dies_and_comes_back(start, store, tmp_path, undisturbed, say):
    """The server is killed while the run streams from it, and started again: the run waits and goes on."""
    with start("first") as launch:
        wait_until(lambda: lines_of(tmp_path / "run") >= 3, "three steps", launch.output)
        store.stop()
        say(f"server killed at step {lines_of(tmp_path / 'run')}, {shards_in(tmp_path / 'cache')} shards in the cache")
        wait_until(lambda: "is out of reach" in launch.output(), "the outage is noticed", launch.output)
        say(next(line for line in launch.output().splitlines() if "is out of reach" in line))
        stalled = -1
        while stalled != lines_of(tmp_path / "run"):
            stalled = lines_of(tmp_path / "run")
            time.sleep(2)
        assert stalled < 24 and all(rank.is_alive() for rank in launch.ranks)
        say(f"the run waits after step {stalled}; the server comes back")
        store.start()
        back = time.monotonic()
        wait_until(lambda: lines_of(tmp_path / "run") > stalled, "the next step", launch.output)
        say(f"next step {time.monotonic() - back:.1f} s later")
        assert launch.wait() == [0, 0], launch.output()
        say(next(line for line in launch.output().splitlines() if "is back, after" in line))
    say(same_as(undisturbed, tmp_path / "run"))
    downloads = store.downloads()
    assert len(downloads) == len(set(downloads)) == shards_in(tmp_path / "cache"), "two ranks, one download each"
    say(f"{len(downloads)} shards, each downloaded once for both ranks")
    assert not list((tmp_path / "cache/.incoming").iterdir())


def test_it_stays_away(start, store, tmp_path, undisturbed, say):
    """The server is killed for good: a clear error after bounded patience, and the next start loses nothing."""
    with start("first", prepare=short_patience, prepare_arguments=(4.0,)) as launch:
        wait_until(lambda: lines_of(tmp_path / "run") >= 6, "six steps", launch.output)
        store.stop()
        died = time.monotonic()
        statuses = launch.wait()
        say(f"server killed; statuses {statuses} after {time.monotonic() - died:.1f} s, with a patience of 4 s")
    assert 2 in statuses and 0 not in statuses
    error = next(line for line in launch.output().splitlines() if line.startswith("error: "))
    say(error)
    for part in (f"can't fetch s3://{BUCKET}/set/train/", ".mds: EndpointConnectionError", store.url, "start again"):
        assert part in error
    store.start()
    with start("second") as launch:
        assert launch.wait() == [0, 0], launch.output()
        say(launch.output().splitlines()[0])
    assert "resuming after step" in launch.output()
    say(same_as(undisturbed, tmp_path / "run"))


def test_killed_while_downloading(start, store, tmp_path, undisturbed, say):
    """The server stops answering, both ranks are killed in the middle of their downloads, and it goes on."""
    incoming = tmp_path / "cache/.incoming"
    with start("first") as launch:
        wait_until(lambda: lines_of(tmp_path / "run") >= 3, "three steps", launch.output)
        store.signal(signal.SIGSTOP)
        wait_until(lambda: list(incoming.glob("train--*")), "a download", launch.output)
        for rank in (0, 1):
            launch.kill(rank)
        assert launch.wait() == [-9, -9]
    left = [path.name for path in incoming.iterdir()]
    say(f"killed at step {lines_of(tmp_path / 'run')} while fetching {', '.join(left)}")
    assert left
    store.signal(signal.SIGCONT)
    with start("second") as launch:
        assert launch.wait() == [0, 0], launch.output()
        say(launch.output().splitlines()[0])
    say(same_as(undisturbed, tmp_path / "run"))
    assert not list(incoming.iterdir())


@pytest.mark.parametrize(
    "changes, environ, reason",
    [
        ([], {"AWS_SECRET_ACCESS_KEY": "wrong"}, "HTTP status 403 (wrong credentials"),
        ([], {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentialsError"),
        (["data.remote=s3://no-such-bucket/set"], {}, "HTTP status 404 (not found)"),
        ([f"data.remote=s3://{BUCKET}/no/such/folder"], {}, "HTTP status 404 (not found)"),
    ],
    ids=["wrong key", "no key", "no bucket", "no folder"],
)
def test_refused_at_the_start(start, tmp_path, say, changes, environ, reason):
    """A key or a place that is wrong ends the run at once, with one error."""
    with start("first", *changes, **environ) as launch:
        assert launch.wait() == [2, 2], launch.output()
        say(f"statuses [2, 2] after {launch.seconds:.1f} s")
    (error,) = (line for line in launch.output().splitlines() if line.startswith("error:"))
    say(error)
    assert error.startswith("error: can't fetch s3://") and "/manifest.json: " in error and "credentials" in error
    assert reason in error and "trying again" not in error


def slow_steps(rank: int) -> None:
    from bov_megatron.training.trainer import Trainer

    train_step = Trainer.train_step

    def slowly(*positional):
        time.sleep(0.3)
        return train_step(*positional)

    Trainer.train_step = slowly


def test_told_to_end_while_it_is_away(start, store, tmp_path, undisturbed, say):
    """SIGTERM while a shard for later is being waited for: saved and ended at once, not after all patience."""
    with start("first", prepare=slow_steps) as launch:
        wait_until(lambda: lines_of(tmp_path / "run") >= 2, "two steps", launch.output)
        store.stop()
        wait_until(lambda: "is out of reach" in launch.output(), "the outage is noticed", launch.output)
        told = time.monotonic()
        for rank in launch.ranks:
            rank.terminate()
        wait_until(lambda: not any(rank.is_alive() for rank in launch.ranks), "the end", launch.output)
        statuses, seconds = launch.wait(), time.monotonic() - told
        say(f"SIGTERM after step {lines_of(tmp_path / 'run')}: statuses {statuses} {seconds:.1f} s later")
    assert statuses == [143, 143] and "all steps done are saved" in launch.output()
    store.start()
    with start("second") as launch:
        assert launch.wait() == [0, 0], launch.output()
    say(same_as(undisturbed, tmp_path / "run"))
