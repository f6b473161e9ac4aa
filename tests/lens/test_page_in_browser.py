"""The page of the lens in Chromium, used as people use it, and what it then shows compared with the library.

Skipped where no browser or no playwright is installed.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

from charlm.lens.lens import Lens
from charlm.lens.render import render
from charlm.lens.runs import Runs
from charlm.runs.load import load
from launched import ON_CPU
from tiny import SCRIPTS, TINY, run_script, train

sync_api = pytest.importorskip("playwright.sync_api", reason="not installed, see requirements-lens.txt")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="not installed, see requirements-lens.txt")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DONE = "html[data-state=done]"
REAL = SCRIPTS.parent / "runs" / "enwik8_small"
TEXT = "12 é <b>&amp;\n13 é </script>\nof 14 and 15"
CELL, ROW, HEAD, LABEL = 24, 26, 46, {1280: 104, 390: 36}
"""Pixels of the grid: a cell, the head above the layers, and their names by the width of the window."""
MARKED = """() => Object.fromEntries([...CSS.highlights].map(([name, own]) =>
  [name, [...own].map((range) => [range.startOffset, range.endOffset])]))"""
COLOUR = """([x, y]) => {
  const canvas = document.getElementById("drawn"), scale = canvas.width / canvas.clientWidth;
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, -x * scale, -y * scale);
  return [...pen.getImageData(0, 0, 1, 1).data];
}"""
STOP_AT_ONCE = """() => {
  const press = () => (text.value.length < 4 ? setTimeout(press) : document.getElementById("stop").click());
  press();
}"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


class Seen:
    """A page as somebody sees and uses it."""

    def __init__(self, page: Any, width: int):
        self.page, self.width = page, width

    def done(self) -> "Seen":
        """Wait until all is answered and drawn."""
        self.page.wait_for_selector(DONE, state="attached", timeout=60_000)
        return self

    def text(self, selector: str) -> str:
        return self.page.text_content(selector)

    def rows(self, table: str) -> list[list[str]]:
        """The texts of a table's rows, empty cells left out."""
        found = self.page.eval_on_selector_all(
            f"{table} tbody tr", "all => all.map((row) => [...row.cells].map((x) => x.textContent))"
        )
        return [[cell for cell in row if cell] for row in found]

    def fill(self, text: str) -> "Seen":
        self.page.fill("#text", text)
        return self.done()

    def place(self, symbol: int, layer: int = 2) -> "Seen":
        """Choose a cell with the keyboard: from the end of the text, at the highest of two layers."""
        self.page.focus("#grid")
        for key in ["End", "ArrowUp", *["ArrowLeft"] * (self.symbols() - symbol), *["ArrowDown"] * (2 - layer)]:
            self.page.keyboard.press(key)
        return self.done()

    def symbols(self) -> int:
        return self.page.evaluate("() => size()")

    def marked(self) -> dict[str, list[list[int]]]:
        return {name: spans for name, spans in self.page.evaluate(MARKED).items() if spans}

    def colour(self, symbol: int, layer: int) -> np.ndarray:
        """The colour of a cell's corner, RGB and how opaque it is."""
        scrolled = self.page.evaluate("() => grid.scrollLeft")
        x, y = LABEL[self.width] + CELL * symbol - scrolled + 3, HEAD + ROW * (2 - layer) + 4
        return np.array(self.page.evaluate(COLOUR, [x, y]))


def levels(values: np.ndarray, most: float) -> dict[str, list[list[int]]]:
    """The characters of a text by the shade that their values give: p1 to p8, m1 to m8."""
    shades = np.trunc(8 * np.clip(values / most, -1, 1)).astype(int)
    found: dict[str, list[list[int]]] = {}
    for place, shade in enumerate(shades):
        if shade:
            found.setdefault(f"{'p' if shade > 0 else 'm'}{abs(shade)}", []).append([place, place + 1])
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def change(bits: float) -> str:
    return ("\N{MINUS SIGN}" if bits < 0 else "+") + f"{abs(bits):.2f} bits"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two trained runs, the second with markup for a name, whose layer 1 fell silent."""
    folder = tmp_path_factory.mktemp("lens")
    text = folder / "text.txt"
    text.write_text("".join(f"{number} é <b>&amp; of {number}\n" for number in range(1500)))
    flags = [*TINY, "--data.corpus=file", f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
    flags += ["--aux.layers.enabled=true", "--aux.targets.enabled=true", "--model.ngrams=[2,3]", "--train.steps=100"]
    flags += ["--model.ngram_buckets=50", "--model.ngram_width=4", "--train.valid_every=0.5"]
    flags += ["--train.keep_checkpoints=9", "--train.log_every=1"]
    return [
        train(*flags, f"--run.dir={folder / name}", f"--train.seed={seed}")
        for seed, name in enumerate(("one", "<b>two"))
    ]


@pytest.fixture(scope="module")
def lens(runs) -> Lens:
    return Lens(load(runs[0], device="cpu"))


@contextmanager
def serving(*runs: Path) -> Iterator[str]:
    """The address of a server of some runs, which ends at Ctrl-C."""
    command = [sys.executable, SCRIPTS / "lens.py", *runs, "--no-open", "--device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ON_CPU) as server:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 130


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    with serving(*runs) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def opened(request, browser) -> Iterator[Callable[..., Seen]]:
    """`opened(address)`: the page at an address, as wide as a screen and a phone; at the end nothing must have gone
    wrong, and nothing been asked for elsewhere."""
    width, troubles, asked, contexts = request.param, [], [], []

    def open_page(address: str, **how: Any) -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda asking: asked.append(asking.url))
        page.goto(address)
        seen = Seen(page, width)
        assert seen.done().page.evaluate("() => document.documentElement.scrollWidth") <= width
        return seen

    open_page.asked = asked
    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
    assert {url for url in asked if not url.startswith(("http://127.0.0.1:", "file:", "data:,"))} == set()


def test_a_text_is_coloured_and_measured_as_it_is_typed(opened, address, lens):
    """Guards against colours on the wrong characters, and numbers that lag behind the text."""
    seen = opened(address).fill("12 ")
    seen.page.focus("#text")
    seen.page.keyboard.press("End")
    seen.page.keyboard.type("é <b>x")
    for key in ("Backspace", "Enter", "Home", "ArrowLeft", "ArrowLeft", "b"):
        seen.page.keyboard.press(key)
    seen.done()
    text = "12 é <bb>\n"
    assert seen.page.input_value("#text") == text
    for shown in (text, TEXT):  # typed, and pasted over it
        seen.fill(shown) if shown != text else None
        reading = lens.read(shown)
        assert seen.marked() == levels(reading.bits_by_character(), 8)
        mean = reading.bits.sum() / len(shown)
        assert f"{len(shown)} characters, {mean:.4f} bits per character" in seen.text("#total")
        assert seen.rows("#sizes") == [[name, f"{size} bytes"] for name, size in reading.sizes().items()]
        assert f"{mean:.3f} at the end" in seen.page.get_attribute("#running", "aria-label")


def test_the_grid_is_what_the_layers_expect(opened, address, lens):
    """Guards against cells of another layer, place or offset, and a line that is not where the answer was decided."""
    seen = opened(address).fill(TEXT)
    reading = lens.read(TEXT)
    for offset in (1, 2):
        seen.page.select_option("#offset", str(offset))
        seen.place(14)
        for layer, own in reading.grid(offset).items():
            for place in (10, 13, 15, 16):
                opaque = seen.colour(place, layer)[3] / 255
                assert opaque == pytest.approx(0.6 * own.probability[place], abs=0.01), (offset, layer, place)
            symbol, share = own.symbol[14], own.probability[14]
            seen.place(14, layer)
            name = seen.page.evaluate("(id) => named(id)", int(symbol))
            assert f"layer {layer} expected “{name}” ({percent(share)})" in seen.text("#status")
            assert f"decided at layer {reading.decided(offset)[14]}" in seen.text("#status")
    assert "layer 1 at step " in seen.text("#silent")
    assert seen.text("#headless") == ""
    seen.page.click("#grid", position={"x": LABEL[seen.width] + 8, "y": HEAD + ROW + 8})
    seen.page.keyboard.press("Home")
    assert "Place 0: “1”" in seen.done().text("#status")


def test_a_cell_shows_its_distribution_and_a_pinned_character_is_followed(opened, address, lens):
    """Guards against bars of another cell, and temperature or top-k that change what they should not."""
    seen = opened(address).fill(TEXT).place(8, 1)
    own = lens.distribution(TEXT, 8, layer=1)
    order = np.argsort(-own, kind="stable")
    assert "Layer 1, 1 ahead: the character at place 8" in seen.text("#whose")
    rows = seen.rows("#distribution")
    assert [row[1] for row in rows[:12]] == [percent(own[symbol]) for symbol in order[:12]]
    seen.page.fill("#t", "0.5")
    seen.page.fill("#k", "3")
    seen.done()
    weights = own[order[:3]] ** 2
    drawn = [percent(share) for share in weights / weights.sum()] + ["0.0 %"] * 9
    assert [row[2] for row in seen.rows("#distribution")[:12]] == drawn
    seen.page.check("#all")
    assert len(seen.done().rows("#distribution")) == 256
    seen.page.click("#distribution tbody tr:nth-child(2) button[aria-pressed]")
    seen.done()
    followed = lens.follow(TEXT, int(order[1]))
    assert seen.text("#followed").endswith(
        ", ".join(f"layer {layer} {percent(values[8])}" for layer, values in followed.items())
    )
    seen.place(12, 2)
    assert f"at place 12: layer 1 {percent(followed[1][12])}" in seen.text("#followed")


def test_the_text_is_rewritten_and_branches_stay(opened, address, lens):
    """Guards against a text that goes on from another place, and a branch that is lost."""
    seen = opened(address + "#" + urlencode({"text": TEXT, "n": 12, "t": 0.7, "k": 5, "seed": 3, "place": 9})).done()
    name = seen.page.text_content("#distribution tbody tr:nth-child(1) th")
    symbol = int(np.argmax(lens.distribution(TEXT, 9)))
    seen.page.focus("#distribution tbody tr:nth-child(1) button")
    seen.page.keyboard.press("Enter")
    seen.done()
    before = "".join(lens.read(TEXT).pieces()[:9]) + chr(symbol)
    written = [own.symbol for own in lens.generate(before, length=12, temperature=0.7, top_k=5, seed=3)]
    whole = lens.trained.vocabulary.decode(np.array(written)).decode("utf-8", "replace")
    assert seen.page.input_value("#text").startswith(before)
    assert seen.page.input_value("#text").encode() == (before + whole).encode()
    assert "12 characters in 12 passes" in seen.text("#passes")
    branches = seen.page.locator("#branches button")
    assert branches.count() == 2 and f"[{name.removesuffix(' came')}]" in branches.last.text_content()
    branches.first.click()
    assert seen.done().page.input_value("#text") == TEXT
    branches.last.click()
    assert seen.done().page.input_value("#text") == before + whole
    seen.page.wait_for_url(re.compile("tree=.*branch=1"))
    again = opened(seen.page.url)
    assert again.page.input_value("#text") == before + whole
    assert again.page.locator("#branches button").all_text_contents() == branches.all_text_contents()
    again.page.locator("#branches button").first.click()
    assert again.done().page.input_value("#text") == TEXT
    for tree in ("[[0, 0, 0, 0, 0]]", '[[null, 0, "", 0, "a"], [7, 0, "b", 0, "b"]]', "{"):
        changed = opened(address + "#" + urlencode({"text": TEXT, "tree": tree, "branch": 9}))
        assert changed.page.input_value("#text") == TEXT and changed.page.locator("#branches button").count() == 0


def test_writing_streams_and_stops_and_drafts_are_marked(opened, address, lens):
    """Guards against a page that does nothing else before the end, a Stop that does not stop, and marks that are not
    the drafts'."""
    seed = next(seed for seed in range(99) if next(lens.generate("12 ", length=1, seed=seed)).symbol < 128)
    seen = opened(address + "#" + urlencode({"text": "12 ", "n": 2000, "seed": seed})).done()
    seen.page.evaluate(STOP_AT_ONCE)  # in the page: a click from here may come too late
    seen.page.click("#go")
    assert 4 <= len(seen.done().page.input_value("#text")) < 1500
    seen.fill("12 ")
    seen.page.check("#drafts")
    seen.page.fill("#n", "30")
    seen.page.focus("#go")
    seen.done().page.keyboard.press("Enter")
    seen.done()
    drawn = list(lens.generate("12 ", length=30, drafts=True, seed=seed))
    saved = 30 - drawn[-1].passes
    assert f"30 characters in {drawn[-1].passes} passes, {saved} saved" in seen.text("#passes")
    marked = seen.marked()
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    whole = [decoder.decode(bytes([own.symbol])) != "" for own in drawn]  # a character's first bytes show nothing
    for kind in ("accepted", "rejected"):
        assert len(marked.get(kind, [])) == sum(own.draft == kind for own in itertools.compress(drawn, whole))


def test_what_learning_the_text_changes(opened, address, lens):
    """Guards against shades and means of the model as it is, and shades on the wrong characters."""
    text = TEXT * 2
    seen = opened(address + "#" + urlencode({"text": text, "colour": "adapted"}))
    still, learning = lens.adapted(text)
    characters = [sum(own) for own in np.split(learning - still, lens.trained.vocabulary.begins(lens.ids(text))[1:])]
    assert seen.marked() == levels(np.array(characters), 4)
    means = [own.sum() / len(text) for own in (learning, still)]
    assert "With learning {:.4f}, without {:.4f}.".format(*means) in seen.text("#total")


def test_attention_units_and_ngrams(opened, address, lens):
    """Guards against values of another layer, head, unit or place, and shades on the wrong characters."""
    text = "12 of <b> 13"
    seen = opened(address + "#" + urlencode({"text": text, "place": 9})).done()
    seen.page.select_option("#colour", "attention")
    seen.page.fill("#alayer", "2")
    seen.page.fill("#head", "1")
    weights = lens.attention(text, 2, 1, 9)
    assert seen.done().marked() == levels(weights, weights.max())
    assert f"attention {percent(weights[9])}" in seen.text("#status")
    seen.page.select_option("#colour", "unit")
    seen.page.fill("#ulayer", "1")
    unit = next(unit for unit in range(32) if lens.unit(text, 1, unit).any())
    seen.page.fill("#unit", str(unit))
    values = lens.unit(text, 1, unit)
    assert seen.done().marked() == levels(values.astype(float), np.abs(values).max())
    found = lens.knockouts(text, 9)
    assert [row[:2] for row in seen.rows("#ngrams")] == [[str(own.length), change(own.bits)] for own in found]


def test_checkpoints_and_two_runs(opened, address, lens, runs):
    """Guards against numbers of another checkpoint or run, and a name that is taken for markup."""
    seen = opened(address).fill(TEXT)
    other = Lens(load(runs[1], device="cpu"))
    ones, twos = lens.read(TEXT).bits_by_character(), other.read(TEXT).bits_by_character()
    expected = [
        [name, f"{own.mean():.4f}", str(int(np.ceil(own.sum() / 8)))] for name, own in (("one", ones), ("<b>two", twos))
    ]
    assert seen.rows("#compared") == expected
    seen.page.select_option("#colour", "difference")
    assert seen.done().marked() == levels(twos - ones, 4)
    assert {row[0]: row[1:] for row in seen.rows("#differs")}["train.seed"] == ["0", "1"]
    assert seen.page.locator("b:not(.legend b)").count() == 0
    seen.page.focus("#checkpoint0")
    seen.page.keyboard.press("Home")
    early = Lens(load(runs[0], "50", "cpu")).read(TEXT).bits.sum() / len(TEXT)
    assert f"{early:.4f} bits per character" in seen.done().text("#total")
    seen.page.select_option("#run", "1")
    assert f"{twos.mean():.4f} bits per character" in seen.done().text("#total")


def test_the_address_holds_the_view(opened, address, lens):
    """Guards against a choice that the address forgets, and a stretch of the corpus that is another one there."""
    seen = opened(address)
    seen.page.fill("#start", "100")
    seen.page.fill("#length", "60")
    seen.page.click("#open")
    seen.done()
    assert len(seen.page.input_value("#text")) > 40
    seen.page.select_option("#offset", "2")
    seen.page.select_option("#colour", "unit")
    seen.page.fill("#unit", "5")
    seen.page.fill("#t", "0.5")
    seen.place(55, 1)
    seen.page.click("#distribution tbody tr:nth-child(3) button[aria-pressed]")
    seen.done().page.wait_for_url(re.compile("pin="))
    again = opened(seen.page.url)
    left = CELL * 55 - again.page.evaluate("() => grid.scrollLeft")
    assert 0 <= left <= again.width - LABEL[again.width] - CELL
    for selector in ("#status", "#whose", "#distribution", "#followed", "#scale", "#total", "#ngrams"):
        assert again.text(selector) == seen.text(selector), selector
    assert again.page.input_value("#text") == seen.page.input_value("#text")
    hostile = opened(
        address + "#" + urlencode({"text": "<img src=x onerror=alert(1)>", "place": "x", "run": 9, "colour": "no"})
    )
    assert hostile.page.input_value("#text") == "<img src=x onerror=alert(1)>"
    assert hostile.page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_from_using_the_page(opened, address, scheme):
    """Guards against what axe-core finds: controls without a name, text without contrast, roles that are wrong."""
    view = urlencode({"text": TEXT, "place": 9, "colour": "attention"})
    seen = opened(f"{address}#{view}", color_scheme=scheme, bypass_csp=True)
    seen.page.click("#distribution tbody tr:nth-child(1) button[aria-pressed]")
    found = axe.Axe().run(seen.done().page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []


def test_a_page_of_one_text_opens_from_its_file_without_a_network(opened, runs, lens, tmp_path):
    """Guards against a page for mailing that needs the model, the network or more than 3 MB."""
    text = (TEXT * 200)[:5000]
    (tmp_path / "text.txt").write_text(text)
    assert run_script("lens", str(runs[0]), f"--text={tmp_path / 'text.txt'}", f"--to={tmp_path / 'page.html'}") == 0
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    seen = opened((tmp_path / "page.html").as_uri(), offline=True)
    reading = lens.read(text)
    assert seen.page.input_value("#text") == text
    assert f"{reading.bits.sum() / 5000:.4f} bits per character" in seen.text("#total")
    seen.page.focus("#grid")
    seen.page.keyboard.press("Home")
    seen.done().page.click("#grid", position={"x": LABEL[seen.width] + 5 * CELL + 3, "y": HEAD + 3})
    assert seen.done().text("#status").startswith("Place 5: ")
    best = lens.distribution(text, 5)
    assert float(seen.rows("#distribution")[0][1].removesuffix(" %")) == pytest.approx(100 * best.max(), abs=0.1)
    seen.page.select_option("#offset", "2")
    share = reading.grid(2)[2].probability[5]
    shown = re.search(r"\((.*) %\)", seen.done().text("#status"))[1]
    assert float(shown) == pytest.approx(100 * share, abs=0.1)
    assert seen.page.locator(".live").count() == 0
    assert {url for url in opened.asked if not url.startswith("data:")} == {(tmp_path / "page.html").as_uri()}


def test_a_long_text_makes_no_long_page(opened, runs, tmp_path):
    """Guards against an element or a colour for each of 100,000 characters, whether seen or not."""
    count, rng = 100_000, np.random.default_rng(0)
    symbols = rng.integers(97, 123, count).tolist()
    grid = {"2": {"symbol": symbols, "probability": [0.5] * count}}
    total = {"bits_per_character": 3.0, "characters": count, "charlm": 1, "gzip": 2, "xz": 3}
    reading = {"symbols": symbols, "pieces": list(map(chr, symbols)), "bits": [3.0] * count, "grid": grid}
    reading |= {"decided": [2] * count, "total": total, "others": {}}
    (tmp_path / "page.html").write_text(render(Runs(runs[:1], "cpu").facts(live=False), reading))
    seen = opened((tmp_path / "page.html").as_uri())
    seen.page.focus("#grid")
    seen.page.keyboard.press("End")
    assert "After the text (place 100000)" in seen.done().text("#status")
    seen.page.keyboard.press("ArrowLeft")
    assert f"Place 99999: “{chr(symbols[-1])}”" in seen.done().text("#status")
    assert seen.page.evaluate("() => document.querySelectorAll('*').length") < 500
    (spans,) = seen.marked().values()
    assert 100 < len(spans) < 5000 and spans[-1] == [count - 1, count]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no run in {REAL}")
def test_a_real_run_of_enwik8(opened):
    """Guards against a page that copes with tiny models alone."""
    view = urlencode({"start": 20_000, "length": 1000, "place": 300, "n": 40})
    with serving(REAL) as address:
        seen = opened(f"{address}#{view}")
        lens, text = Lens(load(REAL, device="cpu")), seen.page.input_value("#text")
        reading = lens.read(text)
        assert f"{reading.bits.sum() / len(text):.4f} bits per character" in seen.text("#total")
        own = lens.distribution(text, 300)
        assert [row[1] for row in seen.rows("#distribution")[:12]] == [percent(p) for p in np.sort(own)[:-13:-1]]
        assert [row[1] for row in seen.rows("#ngrams")] == [change(one.bits) for one in lens.knockouts(text, 300)]
        seen.page.click("#go")
        assert "40 characters in 40 passes" in seen.done().text("#passes")
        written = [one.symbol for one in lens.generate(text, length=40)]
        assert seen.page.input_value("#text").encode() == text.encode() + bytes(written)
