import hashlib
import math
import os
import re
import struct
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import charlm
from charlm.compression import coder, container
from charlm.compression.coder import compressed_nats
from charlm.compression.container import largest_claim
from charlm.compression.streams import FAMILY, CodingSettings
from charlm.config import UserError
from charlm.config.adapt import AdaptConfig
from charlm.data.vocabulary import CharacterVocabulary, SentencePieceVocabulary
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

compress = partial(coder.compress, show_progress=False)
decompress = partial(coder.decompress, show_progress=False)


@pytest.fixture
def coded(build_model, tmp_path):
    """`coded(data, **options)`: a model, and the file that it made of `data`."""

    def make(data: bytes, trained=None, **options):
        trained = trained or build_model()
        (tmp_path / "text").write_bytes(data)
        compress(trained, tmp_path / "text", tmp_path / "text.clm", **options)
        return trained, tmp_path / "text.clm"

    return make


def decoded(trained, path: Path) -> bytes:
    target = path.with_name("back")
    target.unlink(missing_ok=True)
    length = decompress(trained, path, target)
    assert length == target.stat().st_size
    return target.read_bytes()


def refused(trained, path: Path, data: bytes) -> str:
    """The message for a damaged file; nothing but the file is there, and an older output is as it was."""
    path.write_bytes(data)
    target = path.with_name("back")
    target.write_bytes(b"older")
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        decompress(trained, path, target)
    assert target.read_bytes() == b"older" and sorted(path.parent.iterdir()) == before
    assert str(path.parent) in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def sealed(data: bytes) -> bytes:
    """A file whose checksum was made to match, as somebody would who means harm."""
    return data[:-8] + hashlib.sha256(data[:-8]).digest()[:8]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=50),
    streams=st.integers(1, 5),
    context=st.integers(1, 8),
    stride=st.integers(1, 8),
    block=st.integers(5, 40),
)
@example(data=b"", streams=5, context=8, stride=5, block=40)
@example(data=b"x", streams=5, context=8, stride=5, block=40)
@example(data=b"\0" * 300, streams=5, context=8, stride=5, block=300)
@example(data=bytes(range(256)) * 2, streams=5, context=8, stride=5, block=300)
@example(data=b"abcdefgh" * 2, streams=2, context=8, stride=8, block=40)
@example(data=b"abcdefgh" * 2, streams=2, context=4, stride=2, block=16)
@example(data=b"abcdefgh" * 2 + b"!", streams=2, context=8, stride=1, block=17)
def test_any_bytes_come_back(coded, data, streams, context, stride, block):
    """Guards against an encoder and a decoder that part at some boundary of streams, contexts or blocks, and special
    cases that are lost: no symbol, one, one only, every one."""
    trained, path = coded(data, streams=streams, context=context, stride=min(stride, context), block=block)
    assert decoded(trained, path) == data


ADAPT = {"rule": "rms", "rate": 0.01, "decay": 0.1, "steps": 2}


EXPERTS = ("heads", "counts", "match")


@pytest.mark.parametrize("how", [{"adapt": ADAPT}, {"experts": EXPERTS}, {"adapt": ADAPT, "experts": EXPERTS[1:]}])
@pytest.mark.parametrize(
    ("length", "streams", "block"), [(0, 2, 40), (1, 1, 40), (90, 1, 90), (100, 3, 40), (200, 3, 200)]
)
def test_what_learns_from_the_text_comes_back(coded, how, length, streams, block):
    """Guards against a decoder that learns at another moment than the encoder, or from other symbols; against blocks
    after which they part; against a model that a file leaves changed; and a size that is not the score's."""
    data = bytes(np.random.default_rng(length).integers(97, 123, length).astype(np.uint8))
    if "experts" in how:
        pytest.importorskip("numba", reason="not installed, see requirements-hf.txt")
    options = {"streams": streams, "block": block, **how}
    trained, path = coded(data, **options)
    before = container.model_digest(trained)
    assert path.read_bytes()[:8] == b"charlm\5\0"
    assert decoded(trained, path) == data == decoded(trained, path)
    assert container.model_digest(trained) == before
    nats, _ = compressed_nats(trained, np.frombuffer(data, np.uint8), **options)
    assert path.stat().st_size <= 1.005 * nats.sum() / np.log(2) / 8 + 280
    with path.open("rb") as file:
        settings = container.read_header(file, "", 256).settings
    assert settings.adapt == (AdaptConfig(**ADAPT) if "adapt" in how else None)
    assert settings.experts == how.get("experts", ())


def test_files_that_need_the_training_split(run_on_disk):
    """Guards against a decoder that has counted another text than the encoder, or none."""
    pytest.importorskip("numba", reason="not installed, see requirements-hf.txt")
    trained, path = charlm.load(run_on_disk), run_on_disk / "part.clm"
    text = trained.config.data.path
    data, bits = text.read_bytes()[-300:], []
    path.with_name("part").write_bytes(data)
    for experts in (("counts",), ("counts", "train")):
        compress(trained, path.with_name("part"), path, streams=2, experts=experts)
        assert decoded(trained, path) == data
        nats, _ = compressed_nats(trained, np.frombuffer(data, np.uint8), streams=2, experts=experts)
        bits.append(nats.sum() / math.log(2))
        assert path.stat().st_size <= 1.005 * bits[-1] / 8 + 280
    assert bits[1] < bits[0] - 20
    text.write_bytes(text.read_bytes().replace(b"7", b"8"))
    with pytest.raises(UserError, match="corpus"):
        decoded(trained, path)


@pytest.mark.parametrize(("streams", "length"), [(1, 100), (7, 1500), (50, 3000)])
def test_the_size_is_what_the_score_predicts(coded, streams, length):
    """Guards against a coder, a header or blocks that cost more than they must."""
    data = Path(__file__).read_bytes()[:length]
    trained, path = coded(data, streams=streams)
    nats, _ = compressed_nats(trained, np.frombuffer(data, np.uint8), streams=streams)
    predicted = nats.sum() / np.log(2) / 8
    assert predicted - 1 <= path.stat().st_size <= 1.005 * predicted + 200


def damages(data: bytes, count: int, seed: int) -> list[bytes]:
    """`count` different files that are not `data`: a bit turned, the end lost, bytes lost, changed or added."""
    random, found = np.random.default_rng(seed), []
    while len(found) < count:
        at, lost, added = int(random.integers(len(data))), int(random.integers(20)), int(random.integers(20))
        turned = bytes([data[at] ^ 1 << int(random.integers(8))])
        found += [data[:at] + turned + data[at + 1 :], data[:at]]
        found += [data[:at] + random.bytes(added) + data[at + lost :]] * (lost + added > 0)
    return found[:count]


@pytest.mark.parametrize("adapt", [None, ADAPT])
def test_200_random_damages_are_refused(coded, adapt):
    """Guards against damage that is decoded to something, or to nothing without a word."""
    trained, path = coded(b"a text that is damaged " * 4, streams=2, block=50, adapt=adapt)
    for spoilt in damages(path.read_bytes(), 200, seed=0):
        refused(trained, path, spoilt)


@pytest.mark.parametrize("adapt", [None, ADAPT])
def test_damage_with_a_checksum_that_matches(coded, adapt):
    """Guards against trust in a checksum that anyone can compute: the content's own is what counts."""
    text = b"a text that is damaged " * 2
    trained, path = coded(text, streams=2, block=30, adapt=adapt)
    for spoilt in damages(path.read_bytes(), 40, seed=1):
        path.write_bytes(sealed(spoilt))
        with suppress(UserError):
            assert decoded(trained, path) == text


def header_with(path: Path, **changes) -> bytes:
    """The file with other values in its header, sealed. They are not checked, as when somebody writes them by hand."""
    with path.open("rb") as file:
        header = container.read_header(file, "", 256)
        start = file.tell()
    facts = {name: changes.pop(name) for name in header._fields if name in changes}
    settings = CodingSettings.model_construct(**dict(header.settings) | changes)
    return sealed(header._replace(settings=settings, **facts).pack() + path.read_bytes()[start:])


LIES = {
    "terabytes": ({"length": 2**40, "symbols": 2**40}, "ends before them"),
    "more symbols than words can code": ({"length": 2**26, "symbols": 2**26, "block": 2**26}, "symbols in"),
    "fewer symbols than bytes": ({"length": 10, "symbols": 92}, "10 bytes in 92 symbols"),
    "too many bytes for its symbols": ({"length": 1000}, "1,000 bytes in 92 symbols"),
    "a block less": ({"length": 50, "symbols": 50}, "more bytes follow"),
    "a block more": ({"length": 101, "symbols": 101}, "ends before them|symbols in"),
    "no streams": ({"streams": 0}, "streams=0"),
    "a block of 2^32 - 1": ({"block": 2**32 - 1}, "block=4294967295"),
    "a context beyond the model's": ({"context": 9}, "context=9"),
    "a stride beyond the context": ({"stride": 9}, "stride=9"),
    "fp16 on a CPU": ({"precision": "fp16"}, "needs a GPU"),
    "another model": ({"model": bytes(16)}, "another model"),
    "another vocabulary": ({"vocabulary": bytes(8)}, "another vocabulary"),
    "another environment": ({"environment": "torch 1.0, abacus"}, "with torch 1.0, abacus; here it is torch"),
    "another probe": ({"probe": bytes(8)}, "last bits"),
    "another content": ({"content": bytes(32)}, "does not decode to the content"),
    "a byte less": ({"length": 91, "symbols": 91}, "does not decode to the content"),
    "a byte more in as many symbols": ({"length": 93}, "does not decode to the content"),
    "a rate that diverges": ({"adapt": AdaptConfig(rule="sgd", rate=1e30)}, "diverged|not finite"),
    "tables that the model lacks": ({"adapt": AdaptConfig(parameters="ngrams")}, "no n-gram tables"),
    "other learning": ({"adapt": AdaptConfig(rate=0.2)}, "last bits"),
    "learning for days": ({"adapt": AdaptConfig.model_construct(steps=2**31)}, "steps=2147483648"),
    "other streams": ({"streams": 3}, "last bits|does not decode"),
    "another context": ({"context": 7}, "last bits|does not decode"),
}


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies(coded, changes, message):
    """Guards against memory and time by what a file claims rather than by what it can hold, and against rubbish."""
    trained, path = coded(b"a text that is damaged " * 4, streams=2, block=50)
    assert re.search(message, refused(trained, path, header_with(path, **changes)))


def test_zeros_hold_no_symbols(coded):
    """Guards against a loop of days over blocks that a file claims in terabytes of zeros, which take no space."""
    trained, path = coded(b"a text", streams=2)
    with path.open("rb") as file:
        header = container.read_header(file, "", 256)
    header = header._replace(length=2**40, symbols=2**40, settings=header.settings.replace(block=2**21))
    assert "claims 2,097,152 symbols in 0 bytes" in refused(trained, path, sealed(header.pack() + bytes(2**21)))


UNNAMED = (
    *(b"", b"{}", b"7", b"[]", b"[7,[]]", b"[[],[]]", b"[null,null]", b'["sgd",[]]', b"[" * 200, b"\xff\xfe"),
    *(b'[{"rate":1},[]]', b'[null,["oracle"]]', b"[null,[],[]]", b"[null,[[]]]"),
    *(b'[["sgd","all",%s,0.02,0.0%s],[]]' % own for own in ((b"0.1", b""), (b"NaN", b",1"), (b"0.1", b",1,1"))),
)


@pytest.mark.parametrize("text", UNNAMED)
def test_learning_that_no_header_names(coded, text):
    """Guards against a traceback, or defaults, for settings that no encoder writes."""
    trained, path = coded(b"a text that is damaged " * 4, streams=2, block=50, adapt=ADAPT)
    data = path.read_bytes()
    start = 108 + data[107]
    spoilt = data[:start] + bytes([len(text)]) + text + data[start + 1 + data[start] :]
    assert "its header claims" in refused(trained, path, sealed(spoilt))


FOREIGN = {
    "empty": (b"", "not a file that charlm has compressed"),
    "another's": (b"PK\3\4" + bytes(300), "not a file that charlm has compressed"),
    "the magic alone": (b"charlm", "not a file that charlm has compressed"),
    "no more than magic and version": (b"charlm\3\0", "more bytes than the file"),
    "sealed without header": (sealed(b"charlm\3\0" + bytes(8)), "more bytes than the file"),
    "a name longer than the file": (sealed(b"charlm\3\0" + bytes(99) + b"\xff" + bytes(20)), "more bytes than"),
    "version 1": (b"charlm\1\0" + bytes(200), "version 1, not 3"),
    "a version whose steps were others": (b"charlm\4\0" + bytes(200), "version 4, not 3"),
}


@pytest.mark.parametrize(("data", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file(build_model, tmp_path, data, message):
    """Guards against a traceback, or a guess, for what is no compressed file at all."""
    assert message in refused(build_model(), tmp_path / "text.clm", data)


def test_no_words_stand_for_more_symbols_than_is_legal():
    """Guards against a limit that refuses an honest file of the most predictable text there is."""
    encoder = constriction.stream.queue.RangeEncoder()
    certain = np.zeros((1000, 256))
    certain[:, 7] = 1.0
    for _ in range(500):
        encoder.encode(np.full(1000, 7, np.int32), FAMILY, certain)
    words = len(encoder.get_compressed())
    assert largest_claim(words, 256) >= 500_000
    assert largest_claim(words + 1, 256) - largest_claim(words, 256) < 1_500_000  # 32 bits at 2.2e-5 each


def test_what_does_not_decode_is_not_kept(coded, build_model, tmp_path, monkeypatch):
    """Guards against a file that nobody can read, reported as a success, where arithmetic is not repeatable."""
    trained = build_model()
    forward, generator = trained.heads.forward, torch.Generator().manual_seed(0)
    noise = partial(torch.randn, 1, 1, 1, 256, generator=generator)
    monkeypatch.setattr(trained.heads, "forward", lambda *arguments: forward(*arguments) + noise())
    with pytest.raises(UserError, match="nothing was kept"):
        coded(b"some text" * 5, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_places_that_cannot_be(build_model, tmp_path):
    """Guards against a traceback, a pipe that is waited for, and an input replaced by its own output."""
    trained = build_model()
    text = tmp_path / "text"
    text.write_bytes(b"some text")
    os.mkfifo(tmp_path / "pipe")
    packed, out = tmp_path / "text.clm", tmp_path / "out"
    compress(trained, text, packed)
    for work, source, target, message in (
        (compress, tmp_path / "none", out, "No such file"),
        (decompress, tmp_path, out, "is a folder"),
        (compress, tmp_path / "pipe", out, "a pipe or a device"),
        (compress, text, text, "is the input"),
        (decompress, packed, packed, "is the input"),
        (decompress, packed, tmp_path, "not a regular file"),
        (compress, text, tmp_path / "none" / "out", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            work(trained, source, target)
    assert text.read_bytes() == b"some text" and not out.exists()


def test_a_disk_that_is_full(coded, monkeypatch, tmp_path):
    """Guards against hours of decoding for which there is no room."""
    trained, path = coded(b"some text")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 8}))
    assert "needs 9 bytes, and 8 are free" in refused(trained, path, path.read_bytes())


def test_a_text_that_changes_meanwhile(coded, tmp_path, monkeypatch):
    """Guards against a file whose header tells of an earlier content."""

    def scan_and_change(*arguments):
        result = scan(*arguments)
        (tmp_path / "text").write_bytes(b"more text")
        return result

    scan = coder.scan
    monkeypatch.setattr(coder, "scan", scan_and_change)
    with pytest.raises(UserError, match="changed while it was compressed"):
        coded(b"some text")
    assert not (tmp_path / "text.clm").exists()


@pytest.fixture
def model_of(build_model, randomise):
    """`model_of(vocabulary)`: a random model of another vocabulary than bytes."""

    def build(vocabulary):
        trained = build_model()
        return replace(
            trained,
            vocabulary=vocabulary,
            transformer=randomise(CharTransformer(trained.config.model, vocabulary.size)).eval(),
            heads=randomise(Heads(trained.config.model, vocabulary.size, [(2, 1)])).eval(),
        )

    return build


def test_characters_and_sentencepiece(coded, model_of, monkeypatch):
    """Guards against characters of several bytes that are cut between two pieces of a file, lengths in the wrong unit,
    and a coder that knows no vocabulary of one symbol."""
    monkeypatch.setattr("charlm.data.text_files.CHUNK", 5)
    text = "aé漢🙂 b" * 9
    counts = np.bincount([ord(c) for c in text], minlength=0x110000)
    for vocabulary in (CharacterVocabulary("".join(sorted(set(text)))), SentencePieceVocabulary.train(counts, 1.0)):
        for data in (text.encode(), b""):
            trained, path = coded(data, model_of(vocabulary), streams=2, block=21)
            assert decoded(trained, path) == data
    trained, path = coded("ñ and 字".encode(), model_of(vocabulary))  # spelled in bytes
    assert decoded(trained, path) == "ñ and 字".encode()
    trained, path = coded(b"a" * 50, model_of(CharacterVocabulary("a")), streams=3)  # which costs nothing
    assert decoded(trained, path) == b"a" * 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc" * 5 + b"d", "'d' .* at byte 15, and the model's vocabulary .characters. cannot express it"),
        (b"abc" * 5 + b"\xff", "not UTF-8 at byte 15"),
        (b"abc" * 5 + "é".encode()[:1], "not UTF-8 at byte 15"),
    ],
)
def test_symbols_outside_the_vocabulary(coded, model_of, tmp_path, monkeypatch, data, message):
    """Guards against a traceback after hours, and against a message that names the wrong place."""
    monkeypatch.setattr("charlm.data.text_files.CHUNK", 4)
    with pytest.raises(UserError, match=message):
        coded(data, model_of(CharacterVocabulary("abc")))
    assert not (tmp_path / "text.clm").exists()


def test_the_layout_of_the_file(coded):
    """Guards against a format that changes without a new version, on a machine of either byte order."""
    _trained, path = coded(b"some text", streams=2, threads=1)
    data = path.read_bytes()
    assert data[:8] == b"charlm\3\0"
    assert struct.unpack("<QQ", data[8:24]) == (9, 9)
    assert data[24:56] == hashlib.sha256(b"some text").digest()
    assert struct.unpack("<IIIIHBB", data[88:108])[:6] == (2, 8, 5, 2 * 2**16, 1, 0)
    start = 108 + data[107]
    (words,) = struct.unpack("<I", data[start : start + 4])
    assert start + 4 + 4 * words + 8 == len(data)
    assert data[-8:] == hashlib.sha256(data[:-8]).digest()[:8]
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[start + 4 : -8], "<u4"))
    first = decoder.decode(FAMILY, np.full((2, 256), 1 / 256))
    assert bytes(first.tolist()) == b"st"  # of "some " and "text"
