"""What scripts/evaluate.py says of exits, mixtures and parts of a split."""

import json

import pytest

from charlm.data.corpus import load_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.runs.folder import Run
from tiny import run_script


@pytest.fixture
def evaluate(run_on_disk, capfd, monkeypatch):
    """`evaluate(*arguments)`: exit code, stdout and stderr for a run with a head on both of its layers."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return lambda *arguments: (run_script("evaluate", str(run_on_disk), *arguments), *capfd.readouterr())


def test_early_exit_is_shown_as_a_table(evaluate, run_on_disk, tmp_path):
    """Guards against a curve that does not say where its thresholds come from, or that no time is saved; lines wider
    than a terminal; a part of a split that passes for the whole; and a picture that is not drawn."""
    picture = tmp_path / "made" / "curve.svg"
    code, out, err = evaluate("--early-exit", "--limit=200", f"--picture={picture}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    test, valid = (load_corpus(Run(run_on_disk).config().data).splits[name] for name in ("test", "valid"))
    characters = ByteVocabulary().count_characters(test.ids[:200])
    assert f"  first 200 of {test.symbols:,} symbols, {characters} characters, 200 bytes" in lines
    assert f"chosen on the first {valid.symbols:,} of {valid.symbols:,} symbols of the valid split" in out
    assert "scoring computes all of them" in out
    assert lines[-11].split()[:3] == ["0.00", "0.000", "2.00"]
    assert lines[-1].split()[:3] == ["1.00", "any", "1.00"]
    assert all(len(line) <= 80 for line in lines)
    assert picture.stat().st_size > 1000


def test_early_exit_as_json(evaluate):
    """Guards against JSON that only Python reads, and without the protocol."""
    code, out, err = evaluate("--early-exit", "--limit=200", "--split=valid", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (found["split"], found["symbols"], found["stride"]) == ("valid", 200, 8)
    points = found["early_exit"]["points"]
    assert points[0]["bits_per_character"] == pytest.approx(found["bits_per_character"])
    assert points[-1]["bits_per_character"] == pytest.approx(found["layers"]["1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixture=hedge"], "mixture=hedge: the model has no weights"),
        (["--mixture=hedge", "--early-exit"], "--mixture and --early-exit cannot be combined"),
        (["--picture=curve.png"], "--picture requires --early-exit"),
        (["--early-exit", "--picture=curve.txt"], "picture curve.txt: its suffix must be one of"),
    ],
)
def test_what_does_not_go_together(evaluate, arguments, message):
    """Guards against an option that is ignored, and one that fails after minutes of scoring."""
    code, out, err = evaluate(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
