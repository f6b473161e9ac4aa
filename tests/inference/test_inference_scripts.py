"""scripts/evaluate.py and scripts/generate.py, run in this process except for the test that needs two."""

import json
import re
import sys

import pytest

from charlm.data.corpus import load_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.inference.adaptation import adapted
from charlm.inference.evaluation import bits_per_character
from charlm.inference.generation import generate
from charlm.runs.folder import Run
from charlm.runs.load import load
from launched import TORCHRUN, launch
from tiny import SCRIPTS, run_script


@pytest.fixture
def script(script, run_on_disk):
    """`script(name, *arguments)`: exit code, stdout and stderr for a run with a head on both of its layers."""
    return lambda name, *arguments: script(name, run_on_disk, *arguments)


def test_two_processes_and_the_library_agree(run_on_disk):
    """Guards against shares that overlap or a sum that misses a process, and against JSON that is not alone on stdout
    or lacks a key."""
    trained = load(run_on_disk)
    corpus = load_corpus(trained.config.data, show_progress=False)
    expected = bits_per_character(trained, corpus, stride=3, batch_size=5, all_layers=True)
    result = launch([*TORCHRUN, SCRIPTS / "evaluate.py", run_on_disk, "--stride=3", "--all-layers", "--json"])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.pop("seconds") > 0
    for name in ("bits_per_character", "bits_per_byte", "standard_error", "layers"):
        assert found.pop(name) == pytest.approx(getattr(expected, name), abs=1e-6)
    test = corpus.splits["test"]
    assert found == {
        "symbols": test.symbols,
        "characters": test.characters,
        "bytes": test.bytes,
        "split": "test",
        "stride": 3,
        "context_length": 16,
        "checkpoint": "step-00000003",
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "precision": "fp32",
    }


def test_what_evaluate_prints_for_people(script):
    """Guards against a figure without its protocol, or wider than a terminal."""
    code, out, err = script("evaluate", "--split=valid", "--limit=300", "--yardsticks")
    assert (code, err) == (0, "")
    for part in ("bits per character", "bits per byte", "±", "valid", "300", "stride 8", "context 16"):
        assert part in out
    assert "step-00000003 of " in out
    assert all(name in out for name in ("gzip", "bzip2", "xz"))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_corpus_that_has_moved(run_on_disk, script):
    """Guards against runs that can only be scored where they were trained."""
    text = run_on_disk.parent / "text.txt"
    moved = [f"--data.path={text.rename(text.with_name('moved.txt'))}", f"--data.cache_dir={text.with_name('other')}"]
    code, out, err = script("evaluate", "--json", *moved)
    assert (code, err) == (0, "")
    assert json.loads(out)["corpus_sha256"] == load(run_on_disk).corpus["sha256"]


def test_generate_prints_prompts_and_texts(run_on_disk, script):
    """Guards against a script that leaves out options, a prompt or the end, or a text under another's prompt."""
    trained = load(run_on_disk)
    arguments = ["--prompt=12é ", "--length=40", "--temperature=0.9", "--top-k=30", "--top-p=0.9", "--seed=7"]
    options = {"length": 40, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 7}
    assert script("generate", *arguments) == (0, f"12é {generate(trained, '12é ', **options)}\n", "")
    texts = generate(trained, ["12é ", "7"], **options)
    expected = f"12é {texts[0]}\n--------------------\n7{texts[1]}\n"
    assert script("generate", *arguments, "--prompt", "7") == (0, expected, "")


@pytest.mark.parametrize("draft", [None, "offsets"])
def test_generating_in_bulk_shows_progress(run_on_disk, draft, monkeypatch, capsys):
    """Guards against minutes without a word in a terminal, and a bar that stays between the texts."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    generate(load(run_on_disk), ["12é ", "7"], length=3, draft=draft, show_progress=True)
    shown = capsys.readouterr().err
    assert "generating: " in shown and shown.rstrip(" ").endswith("\r")
    generate(load(run_on_disk), ["12é ", "7"], length=3, draft=draft)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("draft", ["offsets", "1"])
def test_generate_drafts(run_on_disk, script, draft):
    """Guards against another text than without drafts, and figures that are missing or among the text."""
    common = ["--prompt=12é ", "--length=40", "--temperature=0"]
    _, plain, _ = script("generate", *common)
    code, out, err = script("generate", *common, f"--draft={draft}", "--num-draft-tokens=1")
    assert (code, out) == (0, plain)
    assert re.fullmatch(r"num_draft_tokens 1, acceptance_rate [01]\.\d{3}, [12]\.\d\d characters per pass\n", err)


def test_generate_with_exits(run_on_disk, script):
    """Guards against an exit that the script leaves out, and figures that are missing or among the text. A context of
    16 is read again five times, by all layers."""
    code, out, err = script("generate", "--prompt=12é ", "--length=40", "--exit-entropy=99")
    assert (code, out) == (0, f"12é {generate(load(run_on_disk), '12é ', length=40, exit_entropy=99.0)}\n")
    expected = r"predicted by layer 1 88%, layer 2 12%; 1\.12 layers on average, [\d,]+ symbols per second\n"
    assert re.fullmatch(expected, err)


def test_early_exit_is_shown_as_a_table(script, run_on_disk, tmp_path):
    """Guards against a curve that does not say where its thresholds come from, or that no time is saved; lines wider
    than a terminal; a part of a split that passes for the whole; and a picture that is not drawn."""
    picture = tmp_path / "made" / "curve.svg"
    code, out, err = script("evaluate", "--early-exit", "--limit=200", f"--picture={picture}")
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


def test_adaptive_scores(run_on_disk, script):
    """Guards against an adaptive figure without its protocol, options that the script leaves out, and a choice of rates
    whose command scores something else than was tried."""
    asked = ("--adapt", "--adapt.rate=0.01", "--adapt.ngram_rate=0", "--streams=3", "--stride=5", "--limit=300")
    code, out, err = script("evaluate", *asked)
    assert (code, err) == (0, "")
    for part in ("adaptive: {rule: rms, parameters: all, rate: 0.01", "3 streams", "stride 5"):
        assert part in out
    assert "compressor" not in out and all(len(line) <= 80 for line in out.splitlines())
    found = json.loads(script("evaluate", *asked, "--json")[1])
    assert (found["streams"], found["adapt"]["rate"], found["adapt"]["ngram_rate"]) == (3, 0.01, 0.0)
    code, out, err = script("evaluate", "--adapt=tune", *asked[1:])
    *tried, last = out.splitlines()
    assert (code, err) == (0, "") and len(tried) >= 3 and all("of the valid split" in line for line in tried)
    assert tried[0].startswith("rate 0.01, ngram_rate 0: ")
    assert "--streams=3" in last and "--stride=5" in last and "--adapt.rate=" in last
    found = json.loads(script("evaluate", "--adapt=tune", *asked[1:], "--json")[1])
    assert len(found["tried"]) == len(tried) and {one["split"] for one in found["tried"]} == {"valid"}
    assert found["best"]["bits_per_character"] == min(one["bits_per_character"] for one in found["tried"])


def test_generation_after_reading(run_on_disk, script, tmp_path):
    """Guards against a file that is not read, or read by another model than the one that writes."""
    text = tmp_path / "read.txt"
    text.write_bytes(b"7" * 200)
    trained = load(run_on_disk)
    learned = adapted(trained, text.read_bytes(), {"rule": "sgd", "rate": 0.05})
    options = ("--prompt=12é ", "--length=40", "--seed=7")
    expected = f"12é {generate(learned, '12é ', length=40, seed=7)}\n"
    assert script("generate", *options, f"--adapt={text}", "--adapt.rule=sgd", "--adapt.rate=0.05") == (0, expected, "")
    assert expected != script("generate", *options)[1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--precision=fp16"], "precision=fp16"),
        ("evaluate", ["--checkpoint=4"], "has no checkpoint '4'"),
        ("evaluate", ["--mixture=hedge", "--early-exit"], "--mixture and --early-exit cannot be combined"),
        ("evaluate", ["--picture=curve.png"], "--picture requires --early-exit"),
        ("evaluate", ["--early-exit", "--picture=curve.txt"], "curve.txt"),
        ("evaluate", ["--adapt", "--early-exit"], "--adapt and --early-exit cannot be combined"),
        ("evaluate", ["--adapt=later"], "adapting=later"),
        ("evaluate", ["--adapt=tune", "--as-compressor"], "--adapt tune cannot be combined"),
        ("evaluate", ["--adapt.rate=1"], "need the flag --adapt"),
        ("evaluate", ["--adapt", "--adapt.rate=-1"], "adapt.rate=-1"),
        ("evaluate", ["--streams=2"], "requires --as-compressor, --adapt or --experts"),
        ("generate", [], "prompt"),
        ("generate", ["--prompt=a", "--adapt=none.txt"], "none.txt"),
        ("generate", ["--prompt=a", "--adapt=/dev/null"], "adapt"),
        ("generate", ["--prompt=a", "--adapt.rate=1"], "need the flag --adapt"),
        ("generate", ["--prompt=12345678901234567"], "prompt: has 17 symbols"),
        ("generate", ["--prompt=a", "--draft=all"], "draft=all"),
        ("generate", ["--prompt=a", "--exit-entropy=-1"], "exit_entropy=-1.0: "),
        ("generate", ["--prompt=a", "--exit-entropy=1", "--draft=1"], "cannot be combined with draft"),
    ],
)
def test_bad_input(run_on_disk, script, name, arguments, message):
    """Guards against tracebacks, wrong exit codes, output before the error, options that are ignored, and one that
    fails after minutes of scoring."""
    before = set(run_on_disk.parent.rglob("*"))
    code, out, err = script(name, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert set(run_on_disk.parent.rglob("*")) == before


def test_a_mistyped_run_is_guessed(tmp_path, capfd):
    """Guards against a message that leaves the user to look for the run, and one that names what is no run."""
    for folder, files in (("demo", ("config.yaml", "provenance.json")), ("dmo2", ("config.yaml",))):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    for name, expected in (("dmo", "did you mean demo?"), ("elsewhere", "give a run's folder")):
        assert run_script("evaluate", str(tmp_path / name)) == 2
        assert expected in capfd.readouterr().err
