"""`generate`, killed with -9 at random moments: nothing finished is lost, the set ends up the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.pipe
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills are of forks")
def test_kills_at_random_moments_lose_nothing(tiny_folder: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.faults_generate", "--kills", "5", "--model", str(tiny_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == figures["equal"] == 5
    assert figures["lost"] == figures["damaged"] == 0
    assert len(set(figures["left"])) > 1  # the moments were not all alike
