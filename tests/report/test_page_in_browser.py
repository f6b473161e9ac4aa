"""The report page in headless Chromium, as people see it; skipped where none is installed."""

import json
import os
import re
import shutil
import subprocess

import pytest

import charlm
from charlm.report.page.measured import measure
from charlm.report.page.writing import write_report
from charlm.runs.folder import Run
from tiny import TINY

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
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
    const sizes = [...figure.querySelectorAll("svg text")].map((one) => one.getBoundingClientRect().height);
    seen[figure.id || figure.dataset.figure] = {
      shown: shown.length, left: shown[0]?.left, right: shown[0]?.right, text: Math.max(0, ...sizes),
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
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("".join(f"{number} é <b>&amp;\t</script>\n" for number in range(1500)))
    flags = ["--data.corpus=file", f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
    flags += ["--train.steps=20", "--train.log_every=1", "--train.diagnose_every=10", f"--run.dir={folder / 'run'}"]
    config = charlm.load_config(overrides=[*TINY, *flags])
    run = charlm.train(config)
    measured = measure(Run(run), charlm.load_corpus(config.data), characters=300, progress=False)
    return write_report([run], folder / "report.html", [measured]).read_text()


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
    """Faults: an error in the console, a request, a figure that is hidden, too wide, twice there, or has labels too
    small to read; a passage that does not answer."""
    told = opened(page, tmp_path, width)
    assert told["width"] == width
    assert (told["noticed"], told["requests"], told["console"]) == ([], [], [])
    names = {re.sub(r"-\d+(-\d+)?$", "", name) for name in told["seen"]}
    assert names == {
        "learning", "terms", "weights", "layers", "positions", "passage", "samples", "speed", "diagnostics",
    }  # fmt: skip
    for name, figure in told["seen"].items():
        assert figure["shown"] == 1, name
        assert figure["left"] >= 0 and figure["right"] <= width, name
        assert figure["text"] == 0 or figure["text"] >= 11, name
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
