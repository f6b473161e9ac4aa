"""A cache that the users of a group share."""

import os
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from charlm.config import DataConfig
from charlm.data import corpus as module
from charlm.data.corpus import load_corpus
from charlm.files import locked
from powers import AS_ROOT, OTHER, without_powers


@pytest.fixture
def group(tmp_path) -> Path:
    """A folder of a group in which we are, though our umask lets nobody in."""
    before = os.umask(0o077)
    folder = tmp_path / "group"
    folder.mkdir()
    folder.chmod(0o2775)
    yield folder
    os.umask(before)


def load(text: Path, content: str, cache_dir: Path, **options: object) -> str:
    """The source of a prepared text; what was made for it then belongs to another user of the group."""
    text.write_text(content * 100)
    with without_powers():
        corpus = load_corpus(DataConfig(corpus="file", path=text, cache_dir=cache_dir, **options))
    for path in [cache_dir, *cache_dir.rglob("*")]:
        os.chown(path, OTHER, -1)
    return bytes(corpus.splits["train"].ids[:4]).decode()


@AS_ROOT
def test_each_user_of_a_group_prepares(group, tmp_path):
    """Guards against a text that only the first user of a cache can use, or prepare again when it has changed."""
    cache_dir = group / "made" / "cache"
    for content in ("some text", "text again", "again"):
        for options in ({}, {"vocabulary": "sentencepiece"}):
            load(tmp_path / "text", content, cache_dir, **options)
    assert load(tmp_path / "text", "more", cache_dir) == "more"
    modes = {path.stat().st_mode & 0o2070 for path in cache_dir.rglob("*") if path.is_dir()}
    assert modes == {0o2070}


@AS_ROOT
@pytest.mark.parametrize("left", ["archive", "folder"])
def test_a_download_that_another_user_began(left, group, enwik8, server, monkeypatch, refused):
    """Guards against a download that only the user who began it can go on with."""
    config = DataConfig(corpus="enwik8", cache_dir=group)
    with without_powers(), monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(module, "_cut", lambda *_: (_ for _ in ()).throw(RuntimeError))
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        load_corpus(config)
    archive = group / "enwik8.download" / "enwik8.zip"
    for path in group.rglob("*"):
        os.chown(path, OTHER, -1)
    if left == "folder":
        archive.unlink()
    with without_powers():
        assert load_corpus(config).name == "enwik8"
    assert server.requests == (1 if left == "archive" else 2)
    assert not archive.exists()


@AS_ROOT
def test_locks_that_only_their_maker_may_write(group, tmp_path, refused):
    """Guards against a lock from before, which nobody else can hold, and a message that does not name it."""
    load(tmp_path / "text", "some", group)
    (lock,) = group.glob(".*.lock")
    lock.chmod(0o644)
    load(tmp_path / "text", "other", group)
    held = locked(lock)
    with without_powers():
        held.__enter__()
    with pytest.raises(Timeout):
        FileLock(lock, timeout=0).acquire()
    held.__exit__(None, None, None)
    lock.chmod(0o600)
    with refused("data.cache_dir", str(lock), "Permission denied", "--data.cache_dir"):
        load(tmp_path / "text", "third", group)


def test_a_cache_of_ones_own_stays_private(group, tmp_path):
    """Guards against files that the group of a user can write, though nobody shared the folder."""
    for cache_dir in (tmp_path / "own", tmp_path / "sticky" / "cache"):
        cache_dir.parent.mkdir(exist_ok=True)
        if cache_dir.parent != tmp_path:
            cache_dir.parent.chmod(0o1777)
        (tmp_path / "text").write_text("some" * 100)
        load_corpus(DataConfig(corpus="file", path=tmp_path / "text", cache_dir=cache_dir))
        assert not any(path.stat().st_mode & 0o077 for path in (cache_dir, *cache_dir.rglob("*")))
