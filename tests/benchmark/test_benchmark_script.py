"""scripts/benchmark.py, as a user types it wrongly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["race"], "benchmark=race: must be one of train, evaluate, generate, drafts, auxiliary, scaling"),
        (["train", "--rounds=0"], "rounds=0: must be at least 1"),
        (["train", "--steps=-1"], "steps=-1: must be at least 1"),
        (["train", "--shape=D"], "shape=D: needs a GPU; take S or P"),
        (["train", "--peers=nanoGPT"], "peers=nanoGPT: must be some of x-transformers, transformers GPT-2"),
        (["generate", "--precision=bf16"], "precision=bf16: charlm generates in fp32; use --precision fp32 or auto"),
        (["drafts"], "run=None: `drafts` needs a trained run"),
        (["drafts", "--run=nowhere"], "nowhere"),
        (["train", "--picture=speed.doc"], "picture speed.doc: its suffix must be one of"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Guards against a traceback, and against minutes of measuring before a mistake is found."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
