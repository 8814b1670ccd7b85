"""An S3 server (moto's) on loopback, with a bucket of a folder's files; killed and started like any process.

    python -m tests.support.object_store PORT FOLDER KEYS_FILE

Credentials are checked: KEYS_FILE receives the one pair that may read. The public port opens when the bucket is full.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.support.distributed import free_port

BUCKET = "corpus"


class ObjectStore:
    """Start with `start()`, at the same port each time."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder, self.port = data, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "store.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        keys = self.folder / "keys.json"
        keys.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.object_store", str(self.port), str(self.data), str(keys)],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while not keys.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def environ(self) -> dict[str, str]:
        """What a user exports."""
        return {
            "S3_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **json.loads((self.folder / "keys.json").read_text()),
        }

    def downloads(self) -> list[str]:
        """Paths of all shards it has given out."""
        words = [line.split('"')[1:3] for line in self.log.read_text().splitlines() if '"GET' in line]
        return [call.split()[1] for call, status in words if ".mds" in call and status.split()[0] in ("200", "206")]


def main(port: int, folder: Path, keys: Path) -> None:
    import boto3
    from moto.moto_api._internal import mock_random
    from moto.server import ThreadedMotoServer

    inner, outer = (ThreadedMotoServer(ip_address="127.0.0.1", port=port) for port in (free_port(), port))
    inner.start()
    url = f"http://127.0.0.1:{inner._port}"
    anyone = {"aws_access_key_id": "setup", "aws_secret_access_key": "setup", "region_name": "us-east-1"}
    store = boto3.client("s3", endpoint_url=url, **anyone)
    store.create_bucket(Bucket=BUCKET)
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), BUCKET, f"set/{path.relative_to(folder)}")
    users = boto3.client("iam", endpoint_url=url, **anyone)
    users.create_user(UserName="reader")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    users.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(policy))
    mock_random.seed(1)  # the same key after each start
    key = users.create_access_key(UserName="reader")["AccessKey"]
    check_keys = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(check_keys).close()
    outer.start()
    part = keys.with_suffix(".part")
    part.write_text(
        json.dumps({"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]})
    )
    os.replace(part, keys)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
