"""Local copies of published texts, files and folders: what is read, and what is refused in one message."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import sysconfig
import zipfile
from pathlib import Path

import pytest

from charlm.config import DataConfig, UserError
from charlm.data.sources import PUBLISHED, find_source


def zipped(**files: bytes) -> bytes:
    """A zip archive of these files, and what a Macintosh adds."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in {"__MACOSX/._a": b"not this one", **files}.items():
            archive.writestr(name, content)
    return buffer.getvalue()


AS_IS = "--data.as_is=true"


def read(tmp_path: Path, path: Path | None, corpus: str = "file", **options) -> bytes:
    """The text that a config asks for."""
    config = DataConfig(corpus=corpus, path=path, cache_dir=tmp_path / "cache", **options)
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


NOWHERE = ("missing", "loop", "file/below", "n" * 300)


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


PLAIN = "a\r\nb é\n".encode()
STRANGE = {
    "utf16": ("text".encode("utf-16"), "UTF-8"),
    "utf16, no mark": ("text".encode("utf-16-le"), "NUL bytes"),
    "utf32": ("text".encode("utf-32"), "UTF-8"),
    "gzip in gzip": (gzip.compress(gzip.compress(PLAIN)), "packed twice"),
    "tar in xz": (lzma.compress(bytes(257) + b"ustar"), "unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x61", "unpack it"),
    "two in a zip": (zipped(a=PLAIN, b=PLAIN), "holds 2 files; unpack it into a folder"),
    "parquet": (b"PAR1...", "--data.corpus=hub"),
    "PDF": (b"%PDF-1.7 text", "give plain text"),
    "JPEG": (b"\xff\xd8\xff\xe0", "give plain text"),
    "NUL": (b"text\0", "NUL bytes"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, lambda text: zipped(a=text)])
def test_a_packed_file_is_unpacked(tmp_path, folder, pack):
    """Guards against packed bytes that are taken for text, alone or in a folder, and for UTF-8 that is changed."""
    (folder / "a").write_bytes(pack(PLAIN))
    (folder / "b").write_bytes(b"BZh1 is text, too")
    assert read(tmp_path, folder / "a") == PLAIN
    assert read(tmp_path, folder) == PLAIN + b"BZh1 is text, too"


@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_that_is_no_text_is_refused_unless_meant(tmp_path, folder, kind, refused):
    """Guards against a model of packed or binary bytes whose owner thinks that it reads text, and a file in a folder
    that is not named; newlines, NUL or packed bytes that are converted where they are meant."""
    content, complaint = STRANGE[kind]
    (folder / "a").write_bytes(PLAIN)
    (folder / "b").write_bytes(content)
    for path, place in ((folder, "b "), (folder / "b", "")):
        with refused("data.path", f"data.path={path}: {place}", complaint, *([] if "zip" in kind else [AS_IS])):
            read(tmp_path, path)
    assert read(tmp_path, folder, as_is=True) == PLAIN + content


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path, folder):
    """Guards against an order that depends on the file system, and against a separator between files."""
    for name in ("b", "a/z", "a.txt", "a/b/c", "B", "é"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")
    assert read(tmp_path, folder).decode() == "<B><a.txt><a/b/c><a/z><b><é>"


def test_hidden_files_are_left_out_unless_meant(tmp_path, folder):
    """Guards against what a file manager or an editor leaves, which nobody sees, in the text."""
    for name in (".DS_Store", "._a", ".a.swp", ".git/config", "a", "a~", "#a#", "b/.c/d", "b/e.", "~f", "#g"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")
    assert read(tmp_path, folder) == b"<#g><a><b/e.><~f>"
    assert read(tmp_path, folder / ".DS_Store") == b"<.DS_Store>"
    assert read(tmp_path, folder, as_is=True).count(b"<") == 11


def test_links_are_followed_but_not_in_circles(tmp_path, folder):
    """Guards against text behind a link that is silently left out or read again, and an endless walk."""
    for name in ("below/text", "../elsewhere/more"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(f"<{name[-4:]}>")
    (folder / "again").symlink_to("below/text")
    (folder / "copy").symlink_to("below")
    (folder / "far").symlink_to(tmp_path / "elsewhere")
    (folder / "below" / "circle").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert read(tmp_path, folder) == b"<text><text><more>"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("gone"), lambda path: path.symlink_to(path)])
def test_what_cannot_be_read_is_named(tmp_path, folder, make, refused):
    """Guards against a broken link that is silently left out, and waiting for ever on a pipe."""
    (folder / "text").write_text("text")
    make(folder / "odd")
    with refused("data.path", f"data.path={folder}: ", f"{folder / 'odd'}"):
        read(tmp_path, folder)
    (folder / "odd").rename(folder / ".odd")
    assert read(tmp_path, folder) == b"text"


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
