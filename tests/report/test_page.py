"""The report page: what it shows, against hand arithmetic and brute force; what it must never contain."""

import html.parser
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from charlm.config import (
    AuxConfig,
    Config,
    DataConfig,
    RunConfig,
    TargetsConfig,
    TrainConfig,
    UserError,
    flatten,
)
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.vocabulary import ByteVocabulary
from charlm.objective.build import build_objective
from charlm.report import figures
from charlm.report.metrics import read_runs, short_names
from charlm.report.page import tables
from charlm.report.page.probe import (
    Piece,
    Probe,
    Sample,
    binned,
    measure,
    nats_by_position,
    pieces_of,
    read_passage,
)
from charlm.report.page.render import render, write_report
from charlm.report.style import WINDOW
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import take_snapshot
from charlm.text import visible
from tiny import run_script, small_model

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> &amp; \x1b[31m \u202e"
FETCHED = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
DRAWN = {"learning", "terms", "weights", "layers", "positions", "passage", "samples", "speed", "diagnostics"}


def elements_of(page: str) -> list[tuple[str, dict[str, str]]]:
    """The tag and the attributes of every element."""
    found, parser = [], html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    return found


def figures_in(page: str) -> set[str]:
    """The figures of a page, on which no id may be there twice."""
    ids = [own["id"] for _, own in elements_of(page) if "id" in own]
    assert len(ids) == len(set(ids))
    return DRAWN & {*ids, *(own.get("data-figure") for _, own in elements_of(page))}


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """Most of the time would be spent on samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlm.report.page.probe.SAMPLE", 20)
        yield


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are left empty, as drawing takes seconds."""
    monkeypatch.setattr(
        "charlm.report.page.render.picture",
        lambda name, label, draw: {"name": name, "wide": "", "narrow": ""} if draw.args[0] else None,
    )


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} é <b>&amp;\t</script>\n" for number in range(1500)))
    return path


def make_run(folder: Path, text: Path, *, steps: int = 40, seed: int = 0, **model) -> Run:
    """A run of a random model with two checkpoints, ten training rows, two validations and diagnostics."""
    config = Config(
        data=DataConfig(corpus="file", path=text, cache_dir=text.parent / "cache"),
        model=small_model(context_length=16, **model),
        aux=AuxConfig(targets=TargetsConfig(num_targets=2)),
        train=TrainConfig(steps=40, batch_size=4, seed=seed, valid_symbols=100),
        run=RunConfig(dir=folder),
    )
    run = Run.create(config, load_corpus(config.data, show_progress=False).model_dump())
    torch.manual_seed(seed)
    objective = build_objective(config, 256)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(std=0.3)
    for step in range(4, steps + 1, 4):
        losses = {term.name: {"loss": 5.0 - step / 20 + term.layer / 10, "weight": 1.0} for term in objective.terms}
        run.append_metrics(
            {"step": step, "progress": step / 40, "loss": 9.0, "bits_per_character": 8.0 - step / 10}
            | {"characters_per_second": 1000.0 + step, "seconds": 2.0 * step, "terms": losses}
        )
        if step in (20, 40):
            valid = {"bits_per_character": 7.0 - step / 20, "bits_per_byte": 6.0}
            run.append_metrics({"step": step, "progress": step / 40, "seconds": 2.0 * step, "valid": valid})
            layers = {"layer1": 0.5, "layer2": 1.0}
            heads = {f"{layer}/offset1": 5.0 for layer in layers}
            record = {"bits_per_character": heads, "supervision_ratio": layers, "gradient_norm": layers}
            run.append_metrics({"step": step, "progress": step / 40, "diagnostics": record})
            save_checkpoint(run, take_snapshot(objective, [], {"step": step}), best=step == 20, keep=3)
    return run


def corpus_of(run: Run) -> Corpus:
    return load_corpus(run.config().data, show_progress=False)


@pytest.fixture(scope="module")
def run(corpus_file, tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "first", corpus_file)


@pytest.fixture(scope="module")
def other(corpus_file, tmp_path_factory) -> Run:
    """A run that goes on, one layer deeper."""
    return make_run(tmp_path_factory.mktemp("runs") / "second", corpus_file, steps=24, seed=1, num_layers=3)


@pytest.fixture(scope="module")
def measured(run) -> Probe:
    return measure(run, corpus_of(run), characters=300, show_progress=False)


@pytest.fixture(scope="module")
def page(run, measured, tmp_path_factory) -> str:
    return write_report([run.path], tmp_path_factory.mktemp("page") / "report.html", [measured]).read_text()


def requests_of(text: str) -> Iterator[str]:
    """Everything in a page that a browser would fetch."""
    for _, attributes in elements_of(text):
        yield from (value for name, value in attributes.items() if name in FETCHED)
        if "style" in attributes:
            yield from re.findall(r"url\(([^)]*)\)", attributes["style"])
    for style in re.findall(r"<style>(.*?)</style>", text, re.S):
        assert "@import" not in style
        yield from re.findall(r"url\(([^)]*)\)", style)


def test_every_figure_is_there_twice_and_nothing_is_fetched(page):
    """Faults: a figure lost, for one width alone, without words for those who do not see it; an id twice; a request."""
    assert figures_in(page) == DRAWN
    elements = elements_of(page)
    classes = [own.get("class") for tag, own in elements if tag == "div"]
    assert classes.count("wide") == classes.count("narrow") == 7
    labels = [own["aria-label"] for tag, own in elements if tag == "svg" and own.get("role") == "img"]
    assert len(labels) == 14 and all(labels)
    found = list(requests_of(page))
    assert found and all(request.strip("'\"").startswith(("#", "data:")) for request in found)
    assert len(page.encode()) < 5_000_000


def test_colours_come_from_the_style_sheet(page):
    """Fault: a line or a label that is drawn in one colour on light and dark pages, and is lost on one of them."""
    drawings = "".join(re.findall(r'<svg role="img".*?</svg>', page, re.S))
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawings)) == set()
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    for variable in set(re.findall(r"var\((--[\w-]+)\)", page)):
        assert len(re.findall(rf"{variable}: ", style)) == 2, variable  # for a light page and a dark one


def test_the_table_says_what_the_rows_say(run, measured, page):
    """Fault: figures of another row, or without their step; characters counted by steps of another size."""
    (recorded,), splits = read_runs([run.path]), run.provenance()["corpus"]["splits"]
    (found,) = tables.results([recorded], [measured])
    score = f"{measured.score.bits_per_character:.4f} ± {measured.score.standard_error:.4f}"
    assert found == {
        "steps": "40 of 40",
        "characters seen": f"{40 * recorded.characters_per_step / 1000:.3g}k",
        "training bpc": "4.000",
        "best validation bpc": "5.0000 at step 40",
        "validation bpc, by this page": score,
        "training time": "0:01:20",
        "characters/s": "1,022",
    }
    assert f"on the first 100 of {splits['valid']['symbols']:,} symbols; this page" in page
    assert f" on the first {measured.score.symbols}." in page
    assert "best validation 5.0000 bits per character at step 40" in page
    assert recorded.characters_per_step == pytest.approx(
        4 * 16 * splits["train"]["characters"] / splits["train"]["symbols"]
    )
    losses = recorded.points("terms/layer2/offset2/all/loss")[1]
    assert losses == pytest.approx(5.2 - np.arange(4, 41, 4) / 20)


def test_scores_by_layer_are_those_of_evaluate(run, measured):
    """Fault: layers mixed up, or scored under another protocol than the one that the page names."""
    import charlm

    (recorded,), corpus = read_runs([run.path]), corpus_of(run)
    first = bytes(corpus.splits["valid"].ids).decode()[:300].encode()
    score = charlm.bits_per_character(
        load(run.path), corpus, split="valid", limit=len(first), all_layers=True, show_progress=False
    )
    assert measured.score.layers == pytest.approx(score.layers) and set(score.layers) == {"1", "2"}
    assert (
        f"{len(first)}: 300 characters" in tables.protocols(recorded, measured)["Validation, by this page"]["symbols"]
    )


def test_no_figure_is_of_the_test_split(run, measured, undrawn):
    """Fault: a page that one chooses by, and that scores what is kept for the end."""
    corpus = corpus_of(run)
    reversed_test = corpus.splits["test"].model_copy(update={"ids": corpus.splits["test"].ids[::-1].copy()})
    corpus = corpus.model_copy(update={"splits": corpus.splits | {"test": reversed_test}})
    changed = measure(run, corpus, characters=300, show_progress=False)
    assert changed.score.layers == pytest.approx(measured.score.layers)
    assert np.allclose(changed.by_position, measured.by_position)
    assert changed.passage != measured.passage
    harder = replace(measured, passage=[piece._replace(bits=9.0) for piece in measured.passage])
    pages = [render(read_runs([run.path]), [own]) for own in (measured, harder)]
    first, second = (re.sub(r'<div class="passage".*?</div>|<script.*?</script>', "", own, flags=re.S) for own in pages)
    assert first == second


def test_bits_by_position_against_brute_force(run):
    """Fault: positions off by one, a mean over windows of other positions, bits per symbol called per character."""
    trained, ids = load(run.path), corpus_of(run).splits["test"].ids[:400]
    nats_NT = nats_by_position(trained, ids, 5)
    assert nats_NT.shape == (5, 16)
    for row, start in enumerate((0, 95, 191, 287, 383)):
        for position in (0, 7, 15):
            context = torch.from_numpy(ids[start : start + position + 1].astype(np.int64))[None]
            with torch.no_grad():
                logits_V = trained.heads(trained.transformer(context)[2], 2)[0, -1, 0].double()
            expected = -logits_V.log_softmax(-1)[int(ids[start + position + 1])]
            assert nats_NT[row, position] == pytest.approx(float(expected), rel=1e-4)
    found = {symbols: rest for symbols, *rest in zip(*binned(nats_NT, 1.25), strict=True)}
    column = nats_NT[:, 3] / math.log(2) * 1.25
    assert found[4] == pytest.approx([column.mean(), column.std(ddof=1) / math.sqrt(5)])


def test_wide_bins_cover_every_position_once():
    """Fault: a position in two bins or in none, and a mean that weighs bins' edges twice."""
    nats_WT = np.tile(np.arange(512) * math.log(2), (3, 1))
    edges = np.unique(np.geomspace(1, 513, 25).round().astype(int))
    first, last = edges[:-1], edges[1:] - 1
    symbols, bits, errors = binned(nats_WT, 1.0)
    assert (first[0], last[-1]) == (1, 512)
    assert symbols == pytest.approx(np.sqrt(first * last))
    assert bits == pytest.approx((first + last) / 2 - 1)
    assert not errors.any()


def test_surprise_against_brute_force(run):
    """Fault: a character shaded by its neighbour's surprise, or likeliest characters of another place."""
    trained, ids = load(run.path), corpus_of(run).splits["test"].ids
    passage = read_passage(trained, ids, 50, 12)
    assert sum(piece.num_symbols for piece in passage) == 12
    first_of_window = {50: 34, 51: 38, 52: 38, 53: 38, 54: 38, 55: 42}  # windows of 16, each 4 further than the last
    places = np.cumsum([50] + [piece.num_symbols for piece in passage]).tolist()
    checked = [(piece, place) for piece, place in zip(passage, places, strict=False) if place in first_of_window]
    assert len(checked) >= 4
    for piece, place in checked:
        context = torch.from_numpy(ids[first_of_window[place] : place].astype(np.int64))[None]
        with torch.no_grad():
            probabilities_V = trained.heads(trained.transformer(context)[2], 2)[0, -1, 0].double().softmax(-1)
        top, symbols = probabilities_V.topk(5)
        if piece.num_symbols == 1:
            assert piece.bits == pytest.approx(-math.log2(probabilities_V[int(ids[place])]), rel=1e-4)
        expected = [(visible(bytes([symbol])), p) for symbol, p in zip(symbols.tolist(), top.tolist(), strict=True)]
        assert piece.likeliest == [(text, pytest.approx(p, rel=1e-4, abs=1e-6)) for text, p in expected]


def test_symbols_that_spell_a_character_are_one_piece():
    """Faults: half a character shown as two signs, its bits counted once, stray bytes that end the page, or a sign in
    the text that looks like the end of a line."""
    data = "é\n€".encode() + b"\xff\x80a"
    ids, bits = np.frombuffer(data, np.uint8), np.arange(1.0, len(data) + 1)
    likeliest, symbols = np.full((len(data), 2), 0.5), np.tile([60, 0xE2], (len(data), 1))
    pieces = pieces_of(ByteVocabulary(), ids, bits, likeliest, symbols)
    assert [piece.text for piece in pieces] == ["é", "↵", "€", "\\xFF\\x80", "a"]
    assert [piece.bits for piece in pieces] == [3.0, 3.0, 15.0, 15.0, 9.0]
    assert pieces[0].likeliest == [("<", 0.5), ("\\xE2", 0.5)]
    assert visible("↵\n⇥".encode()) == "\\u21B5↵\\u21E5"
    assert pieces_of(ByteVocabulary(), ids[:0], bits[:0], likeliest[:0], symbols[:0]) == []


def test_hostile_text_stays_text(run, measured, tmp_path):
    """Faults: text of a sample, of a name, of a corpus or of the model that becomes markup, script or a request, ends
    the data of the passage, moves what stands around it, or is read as a formula."""
    folder = tmp_path / "$\\frac{<img src=x>$"
    shutil.copytree(run.path, folder)
    record = json.loads((folder / "provenance.json").read_text())
    record |= {"command": ["train.py", HOSTILE], "git_commit": HOSTILE, "versions": {HOSTILE: "1"}, "machine": 7}
    record["corpus"]["name"] = HOSTILE
    (folder / "provenance.json").write_text(json.dumps(record))
    passage = [Piece("<", 9.0, 1, [(HOSTILE, 0.5)])]
    sample = Sample(20, ["best"], HOSTILE)
    hostile = Probe(prompt=HOSTILE, samples=[sample], passage=passage, missing={"score": HOSTILE})
    text = write_report([folder], tmp_path / "report.html", [hostile]).read_text()
    elements = elements_of(text)
    assert [own for tag, own in elements if tag == "img"] == []
    assert [own for tag, own in elements if tag == "script"] == [{"type": "application/json"}, {}]
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "\x1b" not in text and "\u202e" not in text
    assert all(request.strip("'\"").startswith(("#", "data:")) for request in requests_of(text))
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert json.loads(data) == [["<", 9.0, 1, [[HOSTILE, 0.5]]]]


def test_several_runs_are_overlaid(run, other, tmp_path):
    """Fault: runs under one colour or name, a difference not listed or one that is none, a run left out."""
    path = tmp_path / "new" / "two.html"
    assert run_script("report", str(run.path), str(other.path), "-o", str(path), "--characters=200") == 0
    text = path.read_text()
    assert figures_in(text) == DRAWN
    assert {"first", "second"} <= set(re.findall(r">\s*([a-z]+)</th>", text))
    assert "24 of 40" in text and "going on or stopped" in text
    runs = read_runs([run.path, other.path])
    named = dict(tables.differences([own.config for own in runs]))
    assert named == {"model.num_layers": ["2", "3"], "train.seed": ["0", "1"]}
    learning = text[text.index('id="learning"') : text.index('id="tasks"')]
    assert {"var(--series-0)", "var(--series-1)"} <= set(re.findall(r"var\(--series-\d\)", learning))
    assert text.index("What differs between the runs") < text.index("Learning curves</h2>")


def test_losses_of_the_highest_layers_are_overlaid(run, other):
    """Fault: a lower layer's loss for the highest one's, a task in another's panel, or steps of another size."""
    runs = read_runs([run.path, other.path])
    panels = figures.tasks(runs, WINDOW).axes
    assert [axes.get_title("left") for axes in panels] == ["next character", "2 ahead"]
    for axes in panels:
        for line, recorded, layer in zip(axes.lines, runs, (2, 3), strict=True):
            steps = np.arange(4, recorded.step + 1, 4)
            bits_per_nat = recorded.symbols_per_character / math.log(2)
            assert line.get_xdata() == pytest.approx(steps * recorded.characters_per_step)
            assert line.get_ydata() == pytest.approx((5.0 - steps / 20 + layer / 10) * bits_per_nat)
    assert figures.tasks(runs[:1], WINDOW) is None


SIZES = {"symbols": 1000, "characters": 900, "bytes": 1000}
CORPUS = {"name": "enwik8", "sha256": "a" * 64, "vocabulary": {"name": "bytes", "utf8": True}}
CORPUS |= {"splits": dict.fromkeys(("train", "valid", "test"), SIZES)}
OTHER_TEXT, OTHER_VOCABULARY = {"sha256": "b" * 64}, {"vocabulary": {"name": "characters", "sha256": "c"}}
OTHER_SPLITS = {"splits": CORPUS["splits"] | {"train": SIZES | {"bytes": 1100}}}


@pytest.mark.parametrize(
    ("corpus", "scored", "words", "rows"),
    [
        ({}, (100, 100), None, []),
        ({"name": "file"}, (100, 100), None, []),
        (OTHER_VOCABULARY, (1000, 2000), None, []),
        (OTHER_TEXT | OTHER_VOCABULARY, (1000, 2000), "different texts", ["text", "vocabulary"]),
        (OTHER_SPLITS, (100, 100), "hold out different parts", ["splits"]),
        ({}, (100, 200), "validated on different parts", ["validated on"]),
        (OTHER_VOCABULARY, (100, 100), "validated on different parts", ["vocabulary"]),
        (OTHER_VOCABULARY, (100, 1000), "validated on different parts", ["vocabulary", "validated on"]),
    ],
)
def test_runs_that_do_not_compare_say_so(run, undrawn, corpus, scored, words, rows):
    """Fault: bits per character of different texts drawn over each other without a word, or a warning where there is
    no reason for one: models of one text compare across vocabularies."""
    (first,) = read_runs([run.path])
    trains = [first.config.train.replace(valid_symbols=symbols) for symbols in scored]
    configs = [first.config.replace(train=train) for train in trains]
    records = [flatten({"corpus": own}, "/") for own in (CORPUS, CORPUS | corpus)]
    runs = [replace(first, config=own, provenance=record) for own, record in zip(configs, records, strict=True)]
    why, differing = tables.mismatch(runs) or ("", [])
    assert (words or "") in why and bool(why) == bool(words)
    assert [name for name, _ in differing] == rows
    page = render(runs, [None, None])
    warning, figure = page.find('class="warning"'), page.index('id="learning"')
    assert (0 < warning < figure and why in page) if words else warning == -1


@pytest.mark.parametrize("rows", ["none", "one validation", "nonsense"])
def test_draws_what_there_is(run, tmp_path, rows):
    """Fault: no page for a run that has just begun, has one validation alone, or whose records hold no numbers."""
    folder = Run(shutil.copytree(run.path, tmp_path / "run"))
    folder.metrics_path.write_text("")
    if rows == "one validation":
        folder.append_metrics({"step": 9, "progress": 0.2, "valid": {"bits_per_character": 5.0, "bits_per_byte": 5.0}})
    elif rows == "nonsense":
        folder.append_metrics({"step": 1, "terms": 3, "loss": "x", "hedge": 4, "bits_per_character": [1]})
        folder.append_metrics({"step": 2, "terms": {"layer1/offset1/all": 3, "x": {"loss": "NaN"}}, "loss": math.nan})
        folder.append_metrics({"step": 3, "terms": {"layer9/offset1/all": 3}, "loss": 1e308, "seconds": 1e11})
        folder.append_metrics({"step": 4, "diagnostics": {"gradient_norm": 3, "bits_per_character": {"layer1": "x"}}})
    text = write_report([folder.path], tmp_path / "report.html").read_text()
    drawn = figures_in(text)
    assert "weights" in drawn and ("learning" in drawn) == (rows == "one validation")
    assert "not measured when this page was made" in text
    if rows == "one validation":
        assert "5.0000 at step 9" in text


def test_parts_that_need_what_is_not_there_say_so(run, undrawn, tmp_path):
    """Fault: a page refused, or a part that is silently not there, because the corpus or a checkpoint is gone."""
    without_corpus = measure(run, UserError("data.path=gone: no such file"), show_progress=False)
    text = render(read_runs([run.path]), [without_corpus])
    assert "data.path=gone: no such file" in text
    assert figures_in(text) == DRAWN - {"layers", "positions", "passage"}
    bare = Run(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(bare.checkpoints_path)
    text = render(read_runs([bare.path]), [measure(bare, corpus_of(run), show_progress=False)])
    assert "has no checkpoint" in text
    assert figures_in(text) == DRAWN - {"layers", "positions", "passage", "samples"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["{tmp}/nowhere"], ["nowhere", "not a run"]), (["{run}", "-o", "{tmp}/file/report.html"], ["report", "file/"])],
)
def test_mistakes_are_answered_with_one_message(run, tmp_path, script, arguments, words):
    """Fault: a traceback, another exit code, or a page begun."""
    (tmp_path / "file").write_text("")
    paths = [part.format(tmp=tmp_path, run=run.path) for part in arguments]
    code, _, message = script("report", "--records-only", *paths)
    assert (code, message.count("error: ")) == (2, 1) and all(word in message for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_tell_runs_apart():
    """Fault: two runs of one name in the table and the legend."""
    assert short_names([Path("/a/runs/x"), Path("/a/runs/y")]) == ["x", "y"]
    assert short_names([Path("/a/one/x"), Path("/a/two/x")]) == ["one/x", "two/x"]
    assert short_names([Path("/a/x"), Path("/a/x")]) == ["x", "x"]
