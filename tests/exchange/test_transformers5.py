"""The exported model on the newest transformers 5, beside the project's own 4.57: the same tests, in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "transformers5"
REQUIREMENTS = Path(__file__).with_name("requirements-transformers5.txt")
FILES = ("test_modeling.py", "test_cache.py", "test_generation.py", "test_finetuning.py", "test_export.py")
FILES += ("test_bank_device.py", "test_flash_attention.py")
RUN = """
import sys, pytest, transformers
assert transformers.__version__ == sys.argv[1], transformers.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_the_exported_model_on_transformers_5():
    made = FOLDER / "requirements.txt"
    if not made.is_file() or made.read_text() != REQUIREMENTS.read_text():
        pytest.skip(f"{FOLDER} lacks the packages of {REQUIREMENTS.name}: run tools/setup_env.sh --transformers5")
    [version] = [
        line.split("==")[1] for line in REQUIREMENTS.read_text().splitlines() if line.startswith("transformers==")
    ]
    options = ["-q", "-p", "no:cacheprovider", "--maxfail=10", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, version, *options, *(str(REQUIREMENTS.with_name(name)) for name in FILES)],
        cwd=REQUIREMENTS.parents[2], env={**os.environ, "PYTHONPATH": str(FOLDER)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
