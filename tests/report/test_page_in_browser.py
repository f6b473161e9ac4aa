"""The report page in headless Chromium, as people see it; skipped where none is installed."""

import json
import os
import re
import shutil
import subprocess

import pytest

import charlm
from charlm.report.page.probe import measure
from charlm.report.page.render import write_report
from charlm.runs.folder import Run
from tiny import TINY

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRAWN = {"learning", "terms", "weights", "layers", "positions", "passage", "samples", "speed", "diagnostics"}
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip
WATCH = """<script>
const noticed = [];
addEventListener("error", (event) => noticed.push("error: " + (event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", (event) => noticed.push("request: " + event.blockedURI));
</script>"""
TELL = """<script>
addEventListener("load", () => {
  const seen = {};
  for (const figure of document.querySelectorAll("figure, [data-figure]")) {
    const inside = figure.querySelector("svg") ? [...figure.querySelectorAll("svg")] : [figure];
    const shown = inside.map((one) => one.getBoundingClientRect()).filter((box) => box.width && box.height);
    const words = [...figure.querySelectorAll("svg text")].map((one) => [one.textContent, one.getBoundingClientRect()])
      .filter(([, box]) => box.width && box.height);
    const bounds = shown[0];
    const cut = words.filter(([, box]) => box.left < bounds.left - 1 || box.right > bounds.right + 1
      || box.top < bounds.top - 3 || box.bottom > bounds.bottom + 3);
    const overlap = words.filter(([, a], place) => words.slice(0, place).some(([, b]) =>
      Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.3 * Math.min(a.height, b.height)));
    seen[figure.id || figure.dataset.figure] = {
      shown: shown.length, left: bounds?.left, right: bounds?.right, words: words.length,
      text: Math.max(0, ...words.map(([, box]) => box.height)),
      cut: cut.map(([text]) => text), overlap: overlap.map(([text]) => text),
    };
  }
  const span = document.querySelector(".passage span");
  span.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const result = {
    seen, noticed, width: innerWidth, scroll: document.documentElement.scrollWidth,
    tip: document.getElementById("tip").hidden ? null : document.getElementById("tip").textContent,
    rows: document.querySelectorAll("#tip tr").length,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  };
  parent.postMessage(JSON.stringify(result), "*");
});
</script>"""
FRAME = """<!doctype html><body><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>addEventListener("message", (event) => {{
  const told = document.createElement("script");
  told.type = "told";
  told.textContent = event.data;
  document.body.append(told);
}});</script></body>"""
"""A page inside a page: a browser's own window is never narrower than 500 pixels."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The page of a run with all losses and diagnostics, on a text that a page must not take for its own words."""
    folder = tmp_path_factory.mktemp("small")
    text = folder / "text.txt"
    text.write_text("".join(f"{number} é <b>&amp;\t</script>\n" for number in range(1500)))
    flags = ["--data.corpus=file", f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
    flags += [f"--aux.{loss}.enabled=true" for loss in ("positions", "layers", "targets")]
    flags += ["--train.steps=20", "--train.log_every=1", "--train.diagnose_every=10", f"--run.dir={folder / 'run'}"]
    config = charlm.load_config(overrides=[*TINY, *flags])
    run = charlm.train(config)
    probe = measure(Run(run), charlm.load_corpus(config.data), show_progress=False)
    return write_report([run], folder / "report.html", [probe]).read_text()


def opened(page: str, tmp_path, width: int) -> dict:
    """What a browser of a width tells of a page: what is shown, what went wrong, and what was fetched."""
    watched = page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", TELL + "</body>", 1)
    (tmp_path / "page.html").write_text(watched)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *FLAGS, "--window-size=1400,1000", profile, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    told = re.search(r'<script type="told">(.*?)</script>', done.stdout, re.S)
    assert told, done.stderr[-2000:]
    return json.loads(told[1]) | {"console": re.findall(r".*CONSOLE.*", done.stderr)}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_in_a_browser(page, tmp_path, width):
    """Faults: an error in the console, a request, a figure that is hidden, empty, too wide, twice there, or has labels
    that are cut, lie over each other or are too small to read; a passage that does not answer."""
    assert len(page.encode()) < 5_000_000
    told = opened(page, tmp_path, width)
    assert told["width"] == width
    assert (told["noticed"], told["requests"], told["console"]) == ([], [], [])
    assert {re.sub(r"-\d+(-\d+)?$", "", name) for name in told["seen"]} == DRAWN
    for name, figure in told["seen"].items():
        assert figure["shown"] == 1, name
        assert figure["left"] >= 0 and figure["right"] <= width, name
        assert figure["text"] == 0 or figure["text"] >= 11, name
        assert (figure["cut"], figure["overlap"]) == ([], []), name
    assert told["scroll"] <= width
    assert "bits" in told["tip"] and told["rows"] == 5


def test_a_page_that_fetches_or_fails_would_be_noticed(page, tmp_path):
    """Fault: a watch that sees nothing whatever the page does."""
    guard = re.search(r"<meta http-equiv=[^>]*>", page)[0]
    bad = page.replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>nothing.at.all();</script></main>')
    told = opened(bad, tmp_path, 1280)
    assert any("nothing is not defined" in line for line in told["noticed"])
    assert any(line.startswith("request: http://127.0.0.1:9") for line in told["noticed"])
    assert told["console"]
    told = opened(bad.replace(guard, ""), tmp_path, 1280)
    assert "http://127.0.0.1:9/x.png" in told["requests"]


def test_labels_that_cannot_be_read_would_be_noticed(page, tmp_path):
    """Fault: a look at the labels that finds nothing whatever lies over them."""
    before, after = page.split('<div class="narrow">', 1)
    first, *_, last = re.findall(r"<text.*?</text>", before)
    before = before.replace(first, first + first).replace(last, last.replace("<text", '<text dx="9999"', 1))
    learning = opened(before + '<div class="narrow">' + after, tmp_path, 1280)["seen"]["learning"]
    assert (len(learning["overlap"]), len(learning["cut"])) == (1, 1)
