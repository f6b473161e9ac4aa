"""scripts/compress.py, decompress.py and evaluate.py --as-compressor, run in this process, and their report."""

import bz2
import gzip
import json
import lzma
import math
import shlex

import numpy as np
import pytest

from charlm.compression.report import compressed_sizes
from charlm.data.corpus import load_corpus
from charlm.runs.load import load

TEXT = " ".join(f"{number}é" for number in range(100)).encode()


@pytest.mark.parametrize("adapts", [False, True])
def test_there_and_back(run_on_disk, script, tmp_path, adapts):
    """Guards against scripts that drop an option, or claim success for something else."""
    text, packed, back = tmp_path / "a text", tmp_path / "text.clm", tmp_path / "text.copy"
    text.write_bytes(TEXT)
    options = ("--streams=9", "--context=12", "--stride=4", "--threads=1", "--checkpoint=last")
    learning = ("--adapt", "--adapt.rate=0.01") if adapts else ()
    code, out, err = script("compress", run_on_disk, text, "-o", packed, *options, *learning)
    assert (code, err) == (0, "") and ("rate: 0.01" in out) == adapts
    size = packed.stat().st_size
    for part in (f"{len(TEXT):,} bytes in {size:,}", "9 streams", "context 12", "stride 4", "fp32", "verified in"):
        assert part in out
    *lines, last = out.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    assert shlex.split(last)[2].endswith("scripts/decompress.py")
    code, out, err = script("decompress", *shlex.split(last)[3:])
    assert (code, err) == (0, "") and f"{len(TEXT):,} bytes" in out
    assert back.read_bytes() == TEXT


def test_mistakes_leave_nothing(run_on_disk, script, tmp_path):
    """Guards against a traceback, another exit code than 2, and half an output."""
    text, packed, back = tmp_path / "text", tmp_path / "text.clm", tmp_path / "back"
    text.write_bytes(TEXT)
    before = sorted(tmp_path.iterdir())
    for name, arguments, message in (
        ("compress", (text,), "output"),
        ("compress", (text, "-o", packed, "--streams=0"), "streams=0"),
        ("compress", (text, "-o", packed, "--picture=sizes.exe"), "suffix"),
        ("decompress", (text, "-o", back), "not a file that charlm has compressed"),
    ):
        code, out, err = script(name, run_on_disk, *arguments)
        assert (code, out) == (2, "") and err.startswith("error: ") and message in err and "Traceback" not in err
        assert sorted(tmp_path.iterdir()) == before


def test_the_report(run_on_disk, script, tmp_path):
    """Guards against sizes of something else than the file, and JSON that is not alone on stdout."""
    text, packed, picture = tmp_path / "text", tmp_path / "text.clm", tmp_path / "sizes.png"
    text.write_bytes(TEXT)
    asked = ("--streams=9", "--no-verify", "--report", "--speeds=1,3", f"--picture={picture}")
    code, out, err = script("compress", run_on_disk, text, "-o", packed, *asked, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["compressed"]["compressed_bytes"] == packed.stat().st_size
    characters = len(TEXT.decode())
    sizes = [found["compressed"][unit] for unit in ("bytes", "symbols", "characters")]
    assert sizes == [len(TEXT), len(TEXT), characters]
    assert found["compressed"]["bits_per_character"] == 8 * packed.stat().st_size / characters
    assert found["compressed"]["bits_per_byte"] == 8 * packed.stat().st_size / len(TEXT)
    assert found["compressed"]["verify_seconds"] is None
    others = found["others"]
    assert others["gzip -9"] == pytest.approx(len(gzip.compress(TEXT, 9)), abs=2)
    assert others["bzip2 -9"] == len(bz2.compress(TEXT, 9))
    assert others["xz -9e"] == len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME))
    trained = load(run_on_disk)
    classifier = 256 * (8 + 1)  # one of several
    assert found["model"]["parameters"] == classifier + sum(p.numel() for p in trained.transformer.parameters())
    assert 0.5 < found["model"]["compressed_bytes"] / (2 * found["model"]["parameters"]) < 1.2
    assert list(found["speeds"]) == ["1", "3"] and min(found["speeds"].values()) > 0 < found["generation_speed"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = script("compress", run_on_disk, text, "-o", packed, *asked)
    for part in ("the file", "gzip -9", "xz -9e", "charlm with its model", "3 streams", "generation, one text"):
        assert part in out
    assert all(len(line) <= 80 for line in out.splitlines()[1:-1])


@pytest.mark.parametrize("learning", [(), ("--adapt", "--adapt.rate=0.01")])
def test_the_score_is_that_of_the_file(run_on_disk, script, tmp_path, learning):
    """Guards against a score by another protocol than the file's: other streams, stride or text."""
    trained = load(run_on_disk)
    corpus = load_corpus(trained.config.data, show_progress=False)
    text, packed = tmp_path / "text", tmp_path / "text.clm"
    text.write_bytes(corpus.vocabulary.decode(corpus.splits["test"].ids[:400]))
    asked = ("--streams=8", "--stride=5", *learning)
    assert script("compress", run_on_disk, text, "-o", packed, *asked)[0] == 0
    code, out, err = script("evaluate", run_on_disk, "--limit=400", "--as-compressor", *asked, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["symbols"], found["streams"], found["stride"]) == (400, 8, 5)
    assert ("adapt" in found) == bool(learning)
    predicted = found["compressed_bytes"]
    assert predicted == math.ceil(found["bits_per_byte"] * 400 / 8)
    assert predicted <= packed.stat().st_size <= 1.005 * predicted + (240 if learning else 200)
    code, out, err = script("evaluate", run_on_disk, "--limit=400", "--as-compressor", *asked)
    for part in ("8 streams", "stride 5", f"{predicted:,} bytes compressed"):
        assert part in out


@pytest.mark.parametrize(
    "arguments", [("--streams=3",), ("--as-compressor", "--all-layers"), ("--as-compressor", "--batch-size=3")]
)
def test_options_that_do_not_go_together(run_on_disk, script, arguments):
    """Guards against an option that is silently ignored."""
    code, out, err = script("evaluate", run_on_disk, *arguments)
    assert (code, out) == (2, "") and "--as-compressor" in err


def test_sizes_of_noise_and_of_a_long_period():
    """Guards against bits in place of bytes, pieces that are lost, and a compressor that is not at its best."""
    noise = np.random.default_rng(0).bytes(100_000)
    assert all(1 < size / 100_000 < 1.02 for size in compressed_sizes([noise[:30_000], noise[30_000:]]).values())
    # A period of 50,000 is beyond gzip's window of 32 KiB, but within bzip2's block of 900 kB and xz's dictionary.
    sizes = compressed_sizes([noise[:50_000]] * 4)
    assert sizes["gzip -9"] > 200_000 > 80_000 > sizes["bzip2 -9"] > sizes["xz -9e"]
