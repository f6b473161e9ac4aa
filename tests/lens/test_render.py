"""The page of the lens as a file: what it holds, what it may do, and that no text becomes markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from charlm.lens import render as page
from charlm.lens.render import render

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;{{ facts }} \u2028 \x1b"
FACTS = {
    "runs": [
        {
            "name": HOSTILE,
            "checkpoint": "4",
            "checkpoints": [{"name": "2", "step": 2}, {"name": "4", "step": 4}],
            "context_length": 8,
            "num_layers": 2,
            "num_heads": 2,
            "d_ff": 8,
            "heads": [[1, 1], [2, 1], [2, 2]],
            "silent": {"1/1": 3},
            "ngrams": [],
            "vocabulary": {"size": 3, "names": ["a", "<", HOSTILE], "texts": ["a", "<", HOSTILE]},
            "can_draft": False,
            "can_adapt": False,
        }
    ],
    "differs": [],
    "limits": {"text": 100, "length": 10},
    "corpus": False,
}
READING = {
    "since": 0,
    "of": 3,
    "symbols": [1, 2, 0],
    "pieces": ["<", HOSTILE, "a"],
    "bits": [None, 2.0, 6.5],
    "grid": {
        "1": {"symbol": [None, 0, 0, 1], "probability": [None, 0.4, 0.5, 0.6]},
        "2": {"symbol": [None, 2, 1, 1], "probability": [None, 0.7, 0.8, 0.9]},
    },
    "decided": [None, 2, 2, 1],
    "total": {"bits_per_character": 4.25, "characters": 3, "charlm": 2, "gzip": 100, "xz": 120},
    "others": {
        "2": {
            "grid": {"2": {"symbol": [None, None, 0, 0, 1], "probability": [None, None, 0.25, 0.35, 0.45]}},
            "decided": [None, None, 2, 2, 2],
        }
    },
    "likeliest": {
        "symbols": [None, [2, 0], [1, 0], [1, 2]],
        "probabilities": [None, [0.7, 0.2], [0.8, 0.1], [0.9, 0.05]],
    },
}


class Parts(HTMLParser):
    """The text of each script and style of a page, and all attributes of its elements."""

    def __init__(self, html: str):
        super().__init__()
        self.parts, self.attributes = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag in ("script", "style"):
            self.parts.append((tag, dict(attributes), ""))

    def handle_data(self, data):
        if self.cdata_elem:
            tag, attributes, text = self.parts[-1]
            self.parts[-1] = (tag, attributes, text + data)


@pytest.mark.parametrize("live", [True, False])
def test_what_a_page_holds_is_data_and_only_its_own_script_runs(live):
    """Guards against a text or a name that ends its script, against a script or style that the policy does not name,
    and against anything from outside."""
    facts = FACTS | {"live": live}
    html = render(facts, None if live else READING)
    parts = Parts(html)
    data = {attributes["id"]: json.loads(text) for _, attributes, text in parts.parts if "type" in attributes}
    assert data == {"facts": facts} | ({} if live else {"reading": READING})
    own = {tag: text for tag, attributes, text in parts.parts if not attributes}
    policy = next(value for name, value in parts.attributes if name == "content" and "default-src" in value)
    for tag, text in own.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert policy.endswith("connect-src 'self'" if live else "connect-src 'none'")
    assert {name for name, _ in parts.attributes if name.startswith("on") or name in ("src", "style")} == set()
    assert [value for name, value in parts.attributes if name == "href"] == ["data:,"]
    assert len(own) == 2


def test_the_page_is_small_and_takes_nothing_from_outside():
    """Guards against a page that outgrows its 900 lines, loads code or a font, or makes markup of text."""
    files = sorted(Path(page.__file__).parent.glob("page.*"))
    sources = {path.suffix: path.read_text(encoding="utf-8") for path in files}
    assert sum(source.count("\n") for source in sources.values()) <= 900
    whole = "".join(sources.values())
    assert not re.search(
        r"https?:|//cdn|@import|url\(|innerHTML|insertAdjacent|document\.write|\beval\b|new Function", whole
    )
