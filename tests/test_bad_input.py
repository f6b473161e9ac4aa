"""Wrong input, as a user types it: one message that names the field, the value and the way out, exit code 2, no
traceback, and a disk that is as it was."""

import gzip
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from charlm.data.sources import PUBLISHED
from tiny import TINY, run_script


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a finished run of two steps on it, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("place")
    words = random.Random(0).choices(["a", "few", "words", "in", "no", "order"], k=2000)
    (folder / "text.txt").write_text(" ".join(words))
    (folder / "other.txt").write_text(" ".join(reversed(words)))
    (folder / "short.txt").write_text("only two hundred symbols. " * 8)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "wrong.gz").write_bytes(gzip.compress(bytes(PUBLISHED["enwik8"].size), compresslevel=1))
    (folder / "wrong.xz").write_bytes(lzma.compress(b"not enwik8 at all"))
    (folder / "truncated.gz").write_bytes(gzip.compress(random.Random(0).randbytes(10_000))[:-100])
    (folder / "latin1.txt").write_bytes("café ".encode("latin-1") * 200)
    (folder / "rare.txt").write_text("ab " * 300 + "z")
    for name in ("dataset", "scripted"):
        (folder / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"body": words}), folder / name / "train-0.parquet")
    (folder / "scripted" / "scripted.py").write_text("raise SystemExit('the script was run')")
    for name in ("no_run", "linked", "linking"):
        (folder / name).mkdir()
    (folder / "linked" / "more.txt").write_text("ab " * 400)
    (folder / "linking" / "link").symlink_to(folder / "linked")
    (folder / "typo.yaml").write_text("model:\n  num_layer: 3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CHARLM_CACHE", str(folder / "cache"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert run_script("train", *TINY, *ON_TEXT, "--run.dir=run") == 0
        assert run_script("train", *TINY, "--data.corpus=file", "--data.path=linked", "--run.dir=of_folder") == 0
    return folder


def snapshot(folder: Path) -> dict[str, int]:
    """Every file and folder outside of the cache, with its time of change."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if "cache" not in path.relative_to(folder).parts
    }


ON_TEXT = ["--data.corpus=file", "--data.path=text.txt"]
TEXT, HUB, SOURCE = " ".join(ON_TEXT), "--data.corpus=hub", f"Get it from {PUBLISHED['enwik8'].url}"
SHORT = "train --data.corpus=file --data.path=short.txt"
CASES = {
    "train --config=typo.yaml --train.steps=0": ["model.num_layer", "model.num_layers", "typo.yaml, line 2"],
    "train --train.steps=0 --train.seed=x": ["train.steps=0", "train.seed=x"],
    "train --config=missing.yaml": ["missing.yaml", "does not exist"],
    'explain --aux.tasks={"mood":0.1}': ["aux.tasks", "'mood'", "auxiliary_task"],
    "train --data.corpus=file --data.path=nowhere.txt": ["data.path=", "(No such file", "give a file or folder"],
    "prepare --data.path=wrong.gz": ["data.path=", "wrong.gz: has sha256", PUBLISHED["enwik8"].digest, SOURCE],
    "prepare --data.path=wrong.xz": ["data.path=", "wrong.xz: has 17 bytes", "enwik8 has 100,000,000", SOURCE],
    "prepare --data.corpus=text8 --data.path=truncated.gz": [
        "truncated.gz: cannot be read to its end",
        "fetch it again",
    ],
    "prepare --data.corpus=file --data.path=empty.txt": ["data.path=", "empty.txt: holds no text"],
    "prepare --data.corpus=file --data.path=latin1.txt --data.vocabulary=characters": [
        *("latin1.txt", "not UTF-8 at byte 3", "--data.vocabulary=bytes")
    ],
    "train --data.corpus=file --data.path=rare.txt --data.vocabulary=characters": [
        *("rare.txt", "byte 44 of its test split", "'z' (U+007A)", "--data.vocabulary=sentencepiece")
    ],
    f"prepare {HUB} --data.hub_id=./scripted": ["data.hub_id=", "needs code", "never run", "--data.hub_revision"],
    f"prepare {HUB} --data.hub_id=./dataset": ["data.hub_id=", "['text'] not in", "--data.text_column", "body"],
    f"train {HUB} --data.hub_id=./dataset --data.text_column=body --data.test_split=held": ["no split 'held'", "train"],
    "prepare --data.corpus=lm1b --data.hub_id=./nowhere": ["data.hub_id=", "No such file"],
    SHORT: ["valid split of 10 symbols", "window of 18", "context_length", "raise --data.valid_fraction"],
    f"{SHORT} --data.valid_fraction=0.3": ["test split of 10 symbols", "raise --data.test_fraction"],
    f"{SHORT} --data.valid_fraction=0.93": ["train split of 5 symbols", "lower --data.valid_fraction"],
    f"train {TEXT} --train.mixed_precision=fp16": ["train.mixed_precision=fp16", "use bf16"],
    f"train {TEXT} --run.tracker=aim": ["run.tracker=aim: not installed", "pip install 'aim<4'"],
    f"train {TEXT} --run.dir=run": ["run.dir=run", "--run.resume=true"],
    f"train {TEXT} --run.dir=run --run.resume=true --model.d_ff=64": ["model.d_ff: 32 -> 64"],
    f"train {TEXT} --data.path=other.txt --run.dir=run --run.resume=true": [
        *("another corpus", "sha256", "added: other.txt; removed: text.txt", "data.path")
    ],
    f"train {TEXT} --run.dir=run --run.resume_from=7": ["run has no checkpoint 7", "its steps are: 2, 3"],
    f"train {TEXT} --run.dir=no_run --run.resume=true": ["no_run is not a run"],
    f"train {TEXT} --aux.main_weight=0 --aux.layers.enabled=false": [
        "aux.main_weight=0",
        "losses are zero",
    ],
    "evaluate run --data.path=other.txt": ["corpus=file", "another text", "compress.py RUN FILE", "--report"],
    "train --data.corpus=file --data.path=. --run.dir=new/run": ["data.path=", "run.dir=new/run lies inside"],
    "train --data.corpus=file --data.path=linking --run.dir=linked/x": ["data.path=", "run.dir=linked/x lies inside"],
    f"train {HUB} --data.hub_id=./dataset --run.dir=dataset/run": ["data.hub_id=", "run.dir=dataset/run lies inside"],
    "ablate --data.corpus=file --data.path=no_run --run.dir=no_run/x": [
        "data.path=",
        "run.dir=no_run/x/full/seed-0 lies",
    ],
    "report of_folder -o linked/page.html": ["data.path=", "output=linked/page.html lies inside"],
    "report run --data.path=linking -o linked/page.html": ["data.path=", "output=linked/page.html lies inside"],
    "export of_folder --to=linked/model": ["data.path=", "to=linked/model lies inside"],
    "compress of_folder text.txt -o linked/text.clm": ["data.path=", "output=linked/text.clm lies inside"],
    "compress of_folder text.txt -o new.clm --picture=linked/a.png": ["data.path=", "picture=linked/a.png lies inside"],
    "decompress of_folder text.txt -o linked/copy.txt": ["data.path=", "output=linked lies inside"],
    "evaluate of_folder --early-exit --picture=linked/a.png": ["data.path=", "picture=linked/a.png lies inside"],
    "benchmark drafts --run=of_folder --picture=linked/a.png": ["data.path=", "picture=linked/a.png lies inside"],
    "explain --data.corpus=file --data.path=linked --picture=linked/a.png": [
        "data.path=",
        "picture=linked/a.png lies inside",
    ],
    "evaluate no_run": ["no_run is not a run"],
    "generate nowhere --prompt=a": ["nowhere is not a run"],
}
"""Commands, and what their message says."""


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_answered_with_one_message(case, place, monkeypatch, capfd):
    """Guards against tracebacks, messages that do not help, exit codes that say success, and debris."""
    script, *arguments = case.split()
    monkeypatch.chdir(place)
    monkeypatch.setenv("CHARLM_CACHE", str(place / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = snapshot(place)
    cached = set(os.listdir(place / "cache"))
    assert run_script(script, *(TINY if script == "train" else ()), *arguments) == 2
    shown, printed = capfd.readouterr()
    assert shown == ""
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    for part in CASES[case]:
        assert part in printed
    # A text that was prepared before the mistake was found may stay in the cache, whole; nothing else may.
    new = set(os.listdir(place / "cache")) - cached
    assert all((place / "cache" / name / "corpus.json").exists() for name in new if not name.endswith(".lock"))
    assert snapshot(place) == before
