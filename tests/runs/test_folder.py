"""The folder of a run: made whole, or not at all and with one message."""

import json

import pytest

from charlm.config import Config, RunConfig, UserError
from charlm.runs.folder import Run


def config_in(folder) -> Config:
    return Config(run=RunConfig(dir=folder))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Guards against a traceback where a file is in the way, or the disk takes no new folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path}/file/run: cannot be made \(Not a directory\); choose"):
        Run.create(config_in(tmp_path / "file" / "run"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_left_alone(there, tmp_path):
    """Guards against a run written over what is no run, and an empty folder being refused."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path / there}: exists and is not empty; choose another"):
        Run.create(config_in(tmp_path / there), {})
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert Run.open(Run.create(config_in(tmp_path / "empty"), {}).path).config() == config_in(tmp_path / "empty")


def test_a_machine_without_git(tmp_path, monkeypatch):
    """Guards against a traceback, and half a folder, where git is not installed, as in a container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run.create(config_in(tmp_path / "run"), {"name": "none"})
    assert (run.provenance()["git_commit"], run.provenance()["corpus"]) == (None, {"name": "none"})


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_damaged_record_is_named(content, tmp_path):
    """Guards against a traceback from the depths of a JSON parser."""
    run = Run.create(config_in(tmp_path / "run"), {})
    assert json.loads(run.provenance_path.read_text())["corpus"] == {}
    run.provenance_path.write_text(content)
    with pytest.raises(UserError, match=r"provenance.json cannot be read as JSON"):
        run.provenance()
