"""Local copies of published texts, files and folders: what is read, and what is refused in one message."""

import argparse
import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from charlm.config import DataConfig, UserError
from charlm.data.sources import PUBLISHED, find_source


def read(tmp_path: Path, path: Path | None, corpus: str = "file") -> bytes:
    """The text that a config asks for."""
    config = DataConfig(corpus=corpus, path=path, cache_dir=tmp_path / "cache")
    return b"".join(find_source(config, config.cache_dir, show_progress=False).chunks())


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_the_published_facts(name):
    """Guards against another protocol than the usual splits, which no test on little texts would see."""
    published = PUBLISHED[name]
    assert (published.url, published.member) == (f"http://mattmahoney.net/dc/{name}.zip", name)
    assert (published.size, published.split_sizes) == (10**8, (90_000_000, 5_000_000, 5_000_000))


def test_a_local_copy_may_be_packed(tmp_path, enwik8, pack):
    """Guards against a format that is refused, or known by its suffix only, which a browser may have removed."""
    (tmp_path / "copy").write_bytes(pack(enwik8))
    assert read(tmp_path, tmp_path / "copy", "enwik8") == enwik8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[:-1], "has 499 bytes"),
        (lambda text: text + b"?", "more than 500 bytes"),
        (lambda text: b"?" + text[1:], "has sha256"),
        (lambda text: b"", "has 0 bytes"),
    ],
)
def test_another_text_is_refused(tmp_path, enwik8, pack, change, complaint, refused):
    """Guards against training on something that only bears the corpus's name."""
    published = PUBLISHED["enwik8"]
    (tmp_path / "copy").write_bytes(pack(change(enwik8)))
    with refused("data.path", f"data.path={tmp_path / 'copy'}", complaint, published.digest, published.url):
        read(tmp_path, tmp_path / "copy", "enwik8")


def test_a_damaged_copy_is_refused_in_one_message_or_harmless(tmp_path, enwik8, pack):
    """Guards against a traceback from the depths of a decompressor, and against damage that goes unnoticed."""
    whole = pack(enwik8)
    copy = tmp_path / "copy"
    refused = 0
    for place in range(len(whole)):
        copy.write_bytes(whole[:place])
        with pytest.raises(UserError, match=r"data\.path="):
            read(tmp_path, copy, "enwik8")
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert read(tmp_path, copy, "enwik8") == enwik8  # as when a time stamp was hit
        except UserError:
            refused += 1
    assert refused > len(whole) / 3  # in a zip, much of the rest belongs to another file


NOWHERE = ("missing", "loop", "file/below", "n" * 300, "~nobody-of-this-name/text")


@pytest.mark.parametrize(
    ("corpus", "name", "complaint"),
    [
        *((corpus, name, f"/{name}: cannot read") for corpus in ("enwik8", "file") for name in NOWHERE),
        *(("text8", name, "not a file; give a copy of text8") for name in ("", "pipe")),
        *(("file", name, "neither a file nor a folder") for name in ("pipe", "/dev/null")),
        ("file", "", "/cache lies inside"),
    ],
)
def test_a_path_that_leads_to_no_text_is_refused(tmp_path, monkeypatch, corpus, name, complaint, refused):
    """Guards against tracebacks for paths that lead nowhere, a download where a file was named, a folder opened as a
    file, waiting for ever on a pipe or a device, and a corpus that contains itself, and so changes while it is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    with refused("data.path", complaint):
        read(tmp_path, Path(name), corpus)


def test_a_file_is_taken_as_it_is(tmp_path):
    """Guards against newlines, NUL or compressed bytes that are converted on the way."""
    content = gzip.compress(b"a\r\nb\0\n") + bytes(range(256))
    (tmp_path / "text.gz").write_bytes(content)
    assert read(tmp_path, tmp_path / "text.gz") == content


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path, folder):
    """Guards against an order that depends on the file system, and against a separator between files."""
    for name in ("b", "a/z", "a.txt", "a/b/c", "B", "é"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")
    assert read(tmp_path, folder).decode() == "<B><a.txt><a/b/c><a/z><b><é>"


def test_links_lead_to_files_but_not_in_circles(tmp_path, folder):
    """Guards against an endless walk, and against links to nowhere and pipes that stop it."""
    (folder / "below").mkdir()
    (folder / "below" / "text").write_text("text")
    (folder / "again").symlink_to("below/text")
    (folder / "below" / "circle").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing")
    os.mkfifo(folder / "pipe")
    assert read(tmp_path, folder) == b"texttext"


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, folder, refused):
    """Guards against a mixture of two versions that is served as one of them."""
    for name in "ab":
        (folder / name).write_bytes(b"before")
    config = DataConfig(corpus="file", path=folder, cache_dir=tmp_path / "cache")
    chunks = find_source(config, config.cache_dir, show_progress=False).chunks()
    next(chunks)
    (folder / "a").write_bytes(b"after!")
    with refused("data.path", "changed while it was read"):
        list(chunks)


def test_an_unreadable_file_is_named(tmp_path, folder, monkeypatch, refused):
    """Guards against a text that silently lacks the files its reader may not see."""
    (folder / "secret").write_text("text")

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # a test may run as root, whom no file refuses
    with refused("data.path", f"data.path={folder}", f"cannot read {folder / 'secret'} (Permission denied)"):
        read(tmp_path, folder)
    monkeypatch.setattr(os, "scandir", refuse)
    with refused("data.path", f"cannot read {folder} (Permission denied)"):
        read(tmp_path, folder)


def test_the_standard_library_without_tests_and_packages(tmp_path, monkeypatch):
    """Guards against a demo that learns from tests or from what happens to be installed."""
    kept = ["json/tool.py", "unittest/case.py", "zip.py"]
    skipped = ["json/tests/a.py", "test/b.py", "idlelib/idle_test/c.py", "site-packages/d.py", "dist-packages/e/f.py"]
    skipped += ["json/__pycache__/tool.py", "lib-dynload/g.so", "LICENSE.txt"]
    for name in kept + skipped:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"<{name}>")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.get)
    assert read(tmp_path, None, "python-stdlib").decode() == "".join(f"<{name}>" for name in kept)


def test_the_standard_library_is_the_running_interpreters(tmp_path):
    """Guards against a folder without the sources, such as a virtual environment's own."""
    text = read(tmp_path, None, "python-stdlib")
    for module in (argparse, json):
        assert Path(module.__file__).read_bytes() in text
    assert b"class ArgumentParserTest" not in text
