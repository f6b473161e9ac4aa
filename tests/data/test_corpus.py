"""load_corpus: what is prepared, when it is prepared anew, and what is left on disk when it cannot be."""

import base64
import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import zlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from charlm.config import DataConfig
from charlm.data import corpus as module
from charlm.data.corpus import Corpus, load_corpus, prepared_corpus
from charlm.data.sources import PUBLISHED
from charlm.data.text_files import changes
from charlm.data.vocabulary import ByteVocabulary
from storage import left_of, missing, replaced, written

TEXT = "".join(f"line {number:03d}\n" for number in range(100)).encode()  # 900 bytes


@pytest.fixture
def file_config(tmp_path) -> DataConfig:
    (tmp_path / "text").write_bytes(TEXT)
    return DataConfig(corpus="file", path=tmp_path / "text", cache_dir=tmp_path / "cache")


@pytest.fixture
def enwik8_config(tmp_path, enwik8) -> DataConfig:
    return DataConfig(corpus="enwik8", cache_dir=tmp_path / "cache")


class FullDisk(tqdm):
    """The progress bar of a disk that has no room for the second chunk."""

    def update(self, n=1):
        raise OSError(errno.ENOSPC, "No space left on device")


def texts(corpus: Corpus) -> dict[str, bytes]:
    return {name: corpus.vocabulary.decode(split.ids) for name, split in corpus.splits.items()}


def whole(corpus: Corpus) -> bytes:
    return b"".join(texts(corpus).values())


def left_in(cache_dir: Path) -> list[str]:
    """What the cache holds but for the locks."""
    return sorted(path.name for path in cache_dir.glob("*") if path.suffix != ".lock")


def test_enwik8_is_fetched_verified_and_split(enwik8_config, enwik8):
    """Guards against splits that are off by a byte, and against figures that are not those of the text."""
    corpus = load_corpus(enwik8_config)
    assert texts(corpus) == {"train": enwik8[:450], "valid": enwik8[450:475], "test": enwik8[475:]}
    assert (corpus.name, corpus.source) == ("enwik8", PUBLISHED["enwik8"].url)
    assert corpus.sha256 == hashlib.sha256(enwik8).hexdigest()
    sizes = {name: (split.symbols, split.characters, split.bytes) for name, split in corpus.splits.items()}
    assert sizes == {"train": (450, 441, 450), "valid": (25, 24, 25), "test": (25, 25, 25)}
    for split in corpus.splits.values():
        assert isinstance(split.ids, np.memmap) and split.ids.dtype == np.uint8
        assert not split.ids.flags.writeable


def test_text8_is_verified_by_its_own_checksum(enwik8_config, enwik8, monkeypatch, refused):
    """Guards against a checksum of one kind that is compared with one of another, and against an archive that is
    believed for its own checksum alone."""
    md5 = hashlib.md5(enwik8).hexdigest()
    monkeypatch.setitem(PUBLISHED, "text8", replace(PUBLISHED["enwik8"], algorithm="md5", digest=md5))
    assert load_corpus(enwik8_config.replace(corpus="text8")).sha256 == hashlib.sha256(enwik8).hexdigest()
    monkeypatch.setitem(PUBLISHED, "text8", replace(PUBLISHED["enwik8"], algorithm="md5", digest="0" * 32))
    with refused("data.corpus", f"has md5 {md5}"):
        load_corpus(enwik8_config.replace(corpus="text8", cache_dir=enwik8_config.cache_dir / "other"))


def test_a_local_copy_is_verified_even_if_the_cache_has_the_text(enwik8_config, enwik8, tmp_path, server, refused):
    """Guards against a wrong --data.path that goes unnoticed, and against a right one that is fetched all the same."""
    (tmp_path / "copy").write_bytes(enwik8)
    local = enwik8_config.replace(path=tmp_path / "copy")
    assert load_corpus(local).source == str(tmp_path / "copy")
    assert server.requests == 0
    (tmp_path / "copy").write_bytes(enwik8[::-1])
    with refused("data.path", "has sha256"):
        load_corpus(local)
    assert whole(load_corpus(enwik8_config)) == enwik8
    assert server.requests == 0


@pytest.mark.parametrize(
    ("valid_fraction", "test_fraction", "sizes"),
    [
        (0.05, 0.05, (810, 45, 45)),
        (0.1, 0.2, (630, 90, 180)),
        (0.001, 0.29, (638, 1, 261)),
        (0.5, 0.499, (1, 450, 449)),
    ],
)
def test_a_file_is_split_by_fractions_held_out_at_the_end(file_config, valid_fraction, test_fraction, sizes):
    """Guards against fractions that are mixed up or rounded down, and against bytes in no split or in two."""
    config = file_config.replace(valid_fraction=valid_fraction, test_fraction=test_fraction)
    splits = texts(load_corpus(config))
    assert tuple(splits) == ("train", "valid", "test")
    assert tuple(map(len, splits.values())) == sizes
    assert b"".join(splits.values()) == TEXT


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(text=st.text(st.sampled_from("aé世🎉"), min_size=40, max_size=60), fraction=st.floats(0.1, 0.45))
def test_cuts_fall_between_characters(tmp_path, text, fraction):
    """Guards against a character of UTF-8 text whose bytes are torn into two splits, and counted in one of them."""
    (tmp_path / "text").write_text(text)
    config = DataConfig(corpus="file", path=tmp_path / "text", cache_dir=tmp_path / "cache", valid_fraction=fraction)
    corpus = load_corpus(config)
    pieces = {name: piece.decode() for name, piece in texts(corpus).items()}
    assert "".join(pieces.values()) == text
    for name, split in corpus.splits.items():
        assert (split.characters, split.bytes) == (len(pieces[name]), len(pieces[name].encode()))
    num_bytes = len(text.encode())
    assert abs(corpus.splits["test"].bytes - 0.05 * num_bytes) <= 3.5  # half a byte to round, three to a character


@pytest.mark.parametrize("end", [b"\xff", "é".encode()[:1]])
def test_a_text_that_is_not_utf8_is_counted_and_cut_by_bytes(file_config, end):
    """Guards against binary data that loses its bytes 0x80 to 0xbf from the count, and against text that ends inside a
    character being taken for UTF-8."""
    file_config.path.write_bytes("é".encode() * 449 + b"x" + end)
    corpus = load_corpus(file_config.replace(valid_fraction=0.05 + 1 / 900))
    assert corpus.vocabulary == ByteVocabulary(utf8=False)
    assert [split.characters for split in corpus.splits.values()] == [809, 46, 45]


def test_utf8_is_recognised_across_chunks_and_files(tmp_path, monkeypatch):
    """Guards against a character on the border of two reads that passes for an error, or for two characters."""
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr("charlm.data.text_files.CHUNK", 5)
    text = "世界🎉é" * 20
    half = len(text.encode()) // 2 + 1
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1").write_bytes(text.encode()[:half])
    (tmp_path / "texts" / "2").write_bytes(text.encode()[half:])
    corpus = load_corpus(DataConfig(corpus="file", path=tmp_path / "texts", cache_dir=tmp_path / "cache"))
    assert corpus.vocabulary == ByteVocabulary(utf8=True)
    assert sum(split.characters for split in corpus.splits.values()) == len(text)


def test_a_corpus_is_prepared_once_and_read_without_a_lock(file_config, monkeypatch):
    """Guards against reading the text at every start, and a lock, for which a shared read-only cache has no room."""
    first = load_corpus(file_config)
    monkeypatch.setattr(module, "_prepare", None)
    monkeypatch.setattr(module, "locked", None)
    assert load_corpus(file_config).model_dump() == first.model_dump()
    assert whole(load_corpus(file_config)) == TEXT


def test_a_changed_file_is_prepared_anew(file_config):
    """Guards against old text served for new, even where size and time stamp are the same, and against a cache that
    grows with every change."""
    load_corpus(file_config)
    before = os.stat(file_config.path)
    file_config.path.write_bytes(TEXT.upper())
    os.utime(file_config.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    corpus = load_corpus(file_config)
    assert whole(corpus) == TEXT.upper()
    assert corpus.sha256 == hashlib.sha256(TEXT.upper()).hexdigest()
    assert len(left_in(file_config.cache_dir)) == 1


def test_a_changed_folder_is_prepared_anew(tmp_path):
    """Guards against a file that was added, renamed or removed and goes unnoticed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    config = DataConfig(corpus="file", path=folder, cache_dir=tmp_path / "cache")
    for change, text in (
        (lambda: (folder / "b").write_bytes(b"b" * 50), b"b" * 50),
        (lambda: (folder / "a").write_bytes(b"a" * 50), b"a" * 50 + b"b" * 50),
        (lambda: (folder / "a").rename(folder / "c"), b"b" * 50 + b"a" * 50),
        (lambda: (folder / "b").unlink(), b"a" * 50),
    ):
        change()
        assert whole(load_corpus(config)) == text


def test_the_cache_of_an_earlier_version(file_config):
    """Guards against packed bytes that still pass for text because they were prepared when they did."""
    file_config.path.write_bytes(gzip.compress(TEXT))
    load_corpus(file_config)
    [name] = left_in(file_config.cache_dir)
    record = file_config.cache_dir / name / "corpus.json"
    record.write_text(record.read_text().replace('"files"', '"unknown"'))
    assert prepared_corpus(file_config) is None
    assert whole(load_corpus(file_config)) == TEXT


def test_the_files_that_differ_are_named(tmp_path):
    """Guards against a run that refuses its own text without saying which file is new; a listing as large as the names
    of a large folder; one of a stranger that ends in a traceback."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(TEXT)
    config = DataConfig(corpus="file", path=folder, cache_dir=tmp_path / "cache")
    before = load_corpus(config).files
    assert changes(before, load_corpus(config).files) == ""
    (folder / "a").write_bytes(TEXT.upper())
    (folder / "b").unlink()
    for number in range(2000):
        (folder / f"new\n{number}").write_bytes(b"new")
    now = load_corpus(config).files
    assert changes(before, now) == (
        "; added: new\\n0, new\\n1, new\\n10, new\\n100, new\\n1000 and 1,995 more; removed: b; changed: a"
    )
    assert len(now) < 15_000
    for damaged in ("", "x", "é", 7, None, [], base64.b64encode(zlib.compress(b"[1]")).decode()):
        assert changes(damaged, now) == ""


def test_other_fractions_and_files_do_not_share_a_folder(file_config, tmp_path):
    """Guards against splits of another config, and against two texts that push each other out of the cache."""
    (tmp_path / "other").write_bytes(TEXT[::-1])
    configs = [file_config, file_config.replace(test_fraction=0.1), file_config.replace(path=tmp_path / "other")]
    sizes = [load_corpus(config).splits["test"].bytes for config in configs]
    assert sizes == [45, 90, 45]
    assert len(left_in(file_config.cache_dir)) == 3


def record(**changes):
    """Change entries of corpus.json."""

    def change(folder: Path) -> None:
        path = folder / "corpus.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def sizes(**changes) -> dict:
    return {"symbols": 300, "characters": 300, "bytes": 300} | changes


DAMAGE = {
    "ids missing": missing("ids.bin"),
    "ids, one bit": written("ids.bin", TEXT[:-1] + b"\x0b"),
    "ids, truncated": written("ids.bin", TEXT[:-1]),
    "ids that are a pipe": replaced("ids.bin", os.mkfifo),
    "ids behind a link": replaced("ids.bin", lambda path: path.symlink_to("/dev/null")),
    "record missing": missing("corpus.json"),
    "record that is a list": written("corpus.json", b"[1]"),
    "record that is no text": written("corpus.json", b"\xff"),
    "record of a terabyte": lambda folder: os.truncate(folder / "corpus.json", 1 << 40),
    "record that is a pipe": replaced("corpus.json", os.mkfifo),
    "no splits": record(splits=[]),
    "splits that are numbers": record(splits={"train": 900}),
    "sizes that do not add up": record(splits={name: sizes(symbols=301) for name in module.SPLITS}),
    "splits without characters": record(splits={name: {"symbols": 300} for name in module.SPLITS}),
    "negative sizes": record(splits={name: sizes(characters=-1) for name in module.SPLITS}),
    "sizes as text": record(splits={name: sizes(bytes="300") for name in module.SPLITS}),
    "no name": record(name=None),
    "unknown vocabulary": record(vocabulary={"name": "words"}),
    "another format": record(format=0),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_prepared_anew(file_config, damage):
    """Guards against a crash, a hang, or worse a wrong text, for ever after a disk has failed once."""
    expected = load_corpus(file_config).model_dump()
    [name] = left_in(file_config.cache_dir)
    record = (file_config.cache_dir / name / "corpus.json").read_text()
    damage(file_config.cache_dir / name)
    corpus = load_corpus(file_config)
    assert (file_config.cache_dir / name / "corpus.json").read_text() == record
    assert corpus.model_dump() == expected
    assert whole(corpus) == TEXT


def test_what_a_killed_process_left_is_cleared(file_config):
    """Guards against a temporary folder that blocks every later attempt, or is taken for a corpus."""
    load_corpus(file_config)
    [name] = left_in(file_config.cache_dir)
    folder = file_config.cache_dir / name
    left = folder.rename(left_of(folder))
    (left / "ids.bin").write_bytes(b"half")
    assert whole(load_corpus(file_config)) == TEXT
    assert left_in(file_config.cache_dir) == [name]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no text"),
        (b"x", "its 1 bytes leave the valid split empty"),
        (b"12345678", "its 8 bytes leave the valid split empty"),  # 5 % of 8 bytes round to none
        ("🎉".encode() * 10, "its 40 bytes leave the valid split empty"),  # cuts at 36 and 38 both fall back to 36
    ],
)
def test_a_text_too_short_to_split_is_refused(file_config, content, complaint, refused):
    """Guards against a split without text, found out only when a model is scored on it."""
    file_config.path.write_bytes(content)
    with refused("data.path", f"data.path={file_config.path}", complaint):
        load_corpus(file_config)
    assert left_in(file_config.cache_dir) == []


def test_a_full_disk_leaves_the_cache_as_it_was(file_config, monkeypatch, refused):
    """Guards against a half-written corpus, and against losing the one that was there."""
    load_corpus(file_config)
    [name] = left_in(file_config.cache_dir)
    file_config.path.write_bytes(TEXT.upper())
    monkeypatch.setattr(module, "tqdm", FullDisk)
    with refused("data.cache_dir", f"data.cache_dir={file_config.cache_dir}", "No space left on device"):
        load_corpus(file_config)
    assert left_in(file_config.cache_dir) == [name]
    assert (file_config.cache_dir / name / "ids.bin").read_bytes() == TEXT


def test_a_full_disk_does_not_cost_the_download(enwik8_config, monkeypatch, refused):
    """Guards against fetching 36 MB again because unpacking them failed."""
    monkeypatch.setattr(module, "tqdm", FullDisk)
    with refused("data.cache_dir", "No space left"):
        load_corpus(enwik8_config)
    assert left_in(enwik8_config.cache_dir) == ["enwik8.download"]


def test_a_cache_that_cannot_be_written_is_named(file_config, tmp_path, refused):
    """Guards against a traceback where the cache folder cannot be made."""
    cache_dir = tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("in the way")
    with refused("data.cache_dir", f"data.cache_dir={cache_dir}", "File exists"):
        load_corpus(file_config.replace(cache_dir=cache_dir))


def test_the_cache_may_lie_in_the_users_home(file_config, tmp_path, monkeypatch):
    """Guards against a folder named ~, which is what the default would make if taken to the letter."""
    monkeypatch.setenv("HOME", str(tmp_path))
    load_corpus(file_config.replace(cache_dir=Path("~/cache")))
    assert len(left_in(tmp_path / "cache")) == 1


LOADING = """
import hashlib, sys
from pathlib import Path
from charlm.config import DataConfig
from charlm.data.corpus import load_corpus
from charlm.data.sources import PUBLISHED, Published
PUBLISHED["enwik8"] = {published!r}
print("ready", flush=True)
sys.stdin.readline()
splits = load_corpus(DataConfig(corpus="enwik8", cache_dir=Path({cache_dir!r}))).splits
print(hashlib.sha256(b"".join(bytes(split.ids) for split in splits.values())).hexdigest())
"""


def test_several_processes_at_once_fetch_and_prepare_once(enwik8_config, enwik8, server):
    """Guards against processes that overwrite each other's download or corpus."""
    server.cuts = [100]
    script = LOADING.format(published=PUBLISHED["enwik8"], cache_dir=str(enwik8_config.cache_dir))
    command = [sys.executable, "-W", "error", "-c", script]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(4)
        ]
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate()[0].strip() for process in processes]
    assert answers == [hashlib.sha256(enwik8).hexdigest()] * 4
    assert server.requests == 2
    assert left_in(enwik8_config.cache_dir) == ["enwik8"]
