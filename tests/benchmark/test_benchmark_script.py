"""Mistakes on the command line of scripts/benchmark.py."""

from pathlib import Path

import pytest

from tiny import run_script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["race"], "benchmark=race"),
        (["train", "--rounds=0"], "rounds=0"),
        (["train", "--shape=D"], "shape=D"),
        (["train", "--peers=nanoGPT"], "peers=nanoGPT"),
        (["generate", "--precision=bf16"], "precision=bf16"),
        (["drafts"], "run=None"),
        (["drafts", "--run=nowhere"], "nowhere"),
        (["train", "--picture=speed.doc"], "speed.doc"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capfd) -> None:
    """Guards against a traceback, and against minutes of measuring before a mistake is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run_script("benchmark", *arguments) == 2
    shown, printed = capfd.readouterr()
    assert (shown, len(printed.splitlines()), list(tmp_path.iterdir())) == ("", 1, [])
    assert printed.startswith("error: ") and message in printed
