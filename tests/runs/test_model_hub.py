"""Models pushed to the hub and loaded from it: a server on the loopback interface stands in for it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from charlm.runs.exported import save_model
from fake_hub import COMMIT, FakeHub, fake_hub


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(build_model, tmp_path) -> Path:
    """An exported model."""
    trained = replace(build_model(), scores=({"bits_per_character": 1.5, "split": "test"},))
    return save_model(trained, tmp_path / "exported")


PUSH = """
import charlm
trained = charlm.load("exported", device="cpu")
print(charlm.push_to_hub(trained, "owner/model", private=True))
"""
LOAD = """
import charlm, torch
here, there = charlm.load("exported", device="cpu"), charlm.load("owner/model@main", device="cpu")
for part in ("transformer", "heads"):
    one, other = getattr(here, part).state_dict(), getattr(there, part).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
assert (here.config, here.vocabulary, here.scores) == (there.config, there.vocabulary, there.scores)
print(charlm.generate(there, "some ", length=5))
"""


@pytest.mark.slow
def test_round_trip(hub, folder):
    """Guards against a model that is not the one that was pushed, a card that says something else, files that are
    fetched beside those that are needed, and a network that is needed once the model is there."""
    pushed = hub.run(PUSH)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith(f"owner/model/commit/{COMMIT}")
    files = hub.files["owner/model"]
    assert set(files) == {"config.json", "model.safetensors", "vocabulary.json", "README.md"}
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        assert files[name] == (folder / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert files["README.md"].decode() == card.replace("# exported", "# owner/model").replace(
        'load("exported")', 'load("owner/model")'
    )
    files["hurt.py"] = files["pytorch_model.bin"] = b"raise SystemExit('it was run')"
    hub.answered.clear()
    loaded = hub.run(LOAD)
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert {path.rpartition("/")[2] for path in hub.answered if "/resolve/" in path} == {
        "config.json",
        "model.safetensors",
        "vocabulary.json",
    }
    hub.answered.clear()
    again = hub.run(LOAD, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, loaded.stdout), again.stderr
    assert hub.answered == []


@pytest.mark.slow
def test_what_cannot_be_had(hub, tmp_path):
    """Guards against tracebacks, a mistyped path that is asked for on the hub, and another's model taken for one."""
    hub.files["owner/other"] = {"pytorch_model.bin": b"x"}
    (tmp_path / "runs").mkdir()
    names = {
        "owner/nothing": "is neither a folder nor a model that could be downloaded",
        "owner/other": "was not exported by charlm: it has no config.json",
        "runs/mistyped": "is not a run",
        "mistyped": "is not a run",
        "../owner/other": "is not a run",
    }
    done = hub.run(
        "import charlm\n"
        f"for name in {list(names)}:\n"
        "    try:\n"
        "        charlm.load(name)\n"
        "    except charlm.UserError as error:\n"
        "        print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    for (name, message), line in zip(names.items(), done.stdout.splitlines(), strict=True):
        assert name in line and message in line
    assert not any("mistyped" in path for path in hub.answered)
    offline = hub.run("import charlm; charlm.load('owner/nothing')", HF_HUB_OFFLINE="1")
    assert "UserError: owner/nothing is neither a folder nor a model" in offline.stderr
