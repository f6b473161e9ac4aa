"""scripts/ablate.py on the command line."""

from pathlib import Path

import pytest

from tiny import TINY, table_cells


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "aux.layers.weigth=0,1"], "row 'aux.layers.weigth=0'"),
        (["--methods", "one.yaml", "two.yaml", "--seeds=0"], "seeds=0"),
        (["--run.dir=file"], "run.dir=file"),
    ],
)
def test_bad_input(place, script, arguments: list[str], message: str) -> None:
    """Guards against tracebacks, and folders made before a mistake is found."""
    (place / "file").write_text("")
    code, shown, printed = script("ablate", *arguments)
    assert (code, shown, printed.count("error:")) == (2, "", 1) and "Traceback" not in printed
    assert message in printed and [path.name for path in place.iterdir()] == ["file"]


@pytest.mark.slow
def test_real_runs(place, script) -> None:
    """Guards against a script that does not match scripts/train.py: its options, files, messages and exit codes."""
    (place / "text.txt").write_text(" ".join(map(str, range(2000))))
    (place / "base.yaml").write_text("data: {corpus: file, path: text.txt}\nrun: {dir: out}\n")
    for name, text in {"one": "aux: {layers: {enabled: false}}", "two": "train: {mixed_precision: fp16}"}.items():
        (place / f"{name}.yaml").write_text(text)
    command = ["--config=base.yaml", *TINY[:-2], TINY[-1], "--seeds=2", "--jobs=2", "--row", "full: "]
    command += ["--methods", "one.yaml", "two.yaml"]
    code, shown, printed = script("ablate", *command, "--train.log_every=1")
    assert code == 2
    assert "2 of 6 runs failed; the same command tries them again" in printed
    assert "failed: two, seed 0: train.mixed_precision=fp16" in printed
    assert [(row[0], row[7]) for row in table_cells(shown)[2:]] == [("full", "2"), ("one", "2"), ("two", "0")]
    assert shown == (place / "out" / "table.md").read_text()
    assert {path.name for path in (place / "out").iterdir()} >= {"table.csv", "table.png", "full", "one", "two"}
    assert (place / "out" / "one" / "seed-1" / "checkpoints" / "best").exists()
    code, _, printed = script("ablate", *command[:-1], "--train.log_every=1")
    assert code == 0 and "4 of 4: " not in printed, "a finished run was made again"
    code, _, printed = script("ablate", *command, "--train.batch_size=2")
    assert code == 2 and "was made with another configuration (train.batch_size: 4 -> 2" in printed
