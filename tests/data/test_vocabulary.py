"""The vocabularies: lossless for any text, counted as Python counts, and sentencepiece with the library's own ids."""

import base64
import json
from collections import Counter
from hashlib import sha256
from io import BytesIO
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from charlm.config import DataConfig, UserError
from charlm.data.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    EncodingError,
    SentencePieceVocabulary,
    Vocabulary,
    id_type,
    train_vocabulary,
    vocabulary_from_dict,
)

NAMES = ("bytes", "characters", "sentencepiece")
AWKWARD = "\ufeff a  b\t\n\r\n\0 \u2581\u2581 \u2585 <0x41> <unk> \ufffd \u2028 e\u0301 世界 🎉 \U0010ffff \n"


def train(name: str, text: str, character_coverage: float = 1.0) -> Vocabulary:
    config = DataConfig(vocabulary=name, character_coverage=character_coverage)
    data = text.encode()
    half = len(text[: len(text) // 2].encode())
    return train_vocabulary(config, True, iter([data[:half], data[half:]]))


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(), seen=st.text(), cut=st.integers(0))
@example(text=AWKWARD, seen="abc", cut=7)
@example(text=AWKWARD, seen=AWKWARD, cut=7)
@example(text="abc", seen=AWKWARD, cut=1)
@example(text="\n\n\n", seen="\n", cut=1)
@example(text="\0", seen="\0", cut=1)
def test_what_goes_in_comes_out(name, text, seen, cut):
    """Guards against newlines, repeated spaces, tabs, NUL, CRLF, a byte-order mark or U+2581 that get lost on the way,
    characters outside the vocabulary that become the unknown piece, and counts that depend on where a text is cut."""
    vocabulary = train(name, text if name == "characters" else seen)
    ids = vocabulary.encode(text.encode())
    assert vocabulary.decode(ids) == text.encode()
    assert vocabulary.count_characters(ids) == len(text)
    assert name != "sentencepiece" or 0 not in ids
    assert ids.dtype == id_type(vocabulary.size)
    cut %= len(ids) + 1
    count = vocabulary.count_characters
    assert count(ids[:cut]) + count(ids[cut:]) == count(ids)
    assert type(count(ids)) is int  # JSON knows no np.int64
    begins = vocabulary.begins(ids).tolist()
    assert begins == [place for place in range(len(ids)) if place == 0 or count(ids[[place]])]


@given(st.binary())
def test_bytes_hold_anything(data):
    """Guards against any byte that is changed, dropped or added (newlines, NUL, CR, invalid UTF-8), and against
    PyTorch's warning about read-only arrays."""
    ids = ByteVocabulary().encode(data)
    assert (ids.dtype, ids.tolist(), ids.flags.writeable) == (np.uint8, list(data), True)
    assert ByteVocabulary().decode(ids.astype(np.int64)) == data


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581")), st.text(max_size=30))
@example(AWKWARD.replace("\u2581", ""), AWKWARD)
def test_the_ids_are_those_of_the_library(text, seen):
    """Guards against an encoder of our own that parts from sentencepiece where that is lossless: it takes U+2581 for a
    space, and spells a space that it has no piece for as U+2581."""
    vocabulary = train("sentencepiece", seen + " ")
    library = SentencePieceProcessor(model_proto=vocabulary.model)
    assert vocabulary.encode(text.encode()).tolist() == library.encode(text)
    assert library.decode(vocabulary.encode("a\u2581b".encode()).tolist()) == "a\u2581b"


@pytest.mark.parametrize("coverage", [1.0, 0.9995, 0.99, 0.98])
def test_the_library_would_choose_the_same_characters_from_the_text(coverage):
    """Guards against a vocabulary that is trained on counts and differs from one trained on the text itself."""
    text = "".join(chr(0x61 + number) * (number**3 + 1) for number in range(26)) + "\u4e16" * 7 + " x y"
    with patch.object(SentencePieceTrainer, "train", wraps=SentencePieceTrainer.train) as trained:
        vocabulary = train("sentencepiece", text, coverage)
    model, lines = BytesIO(), (text[start : start + 1000] for start in range(0, len(text), 1000))
    given_text = {"sentence_iterator": lines, "input_format": "text", "model_writer": model}
    SentencePieceTrainer.train(**trained.call_args.kwargs | given_text)
    library = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = {library.id_to_piece(i).replace("\u2581", " ") for i in range(257, library.vocab_size())}
    assert {symbol.decode() for symbol in vocabulary.symbols[257:]} == pieces
    covered = sum(count for character, count in Counter(text).items() if character in pieces)
    assert covered / len(text) >= coverage


def test_rare_characters_are_spelled_in_bytes():
    """Guards against a coverage that is ignored: the one character of 1,000 that may be left out is."""
    text = "a" * 500 + "b" * 490 + " " * 9 + "\u4e16"
    assert train("sentencepiece", text, 1.0).encode("\u4e16".encode()).size == 1
    assert train("sentencepiece", text, 0.9985).encode("\u4e16".encode()).size == 3
    assert train("sentencepiece", text, 0.9985).size == 1 + 256 + 3


@pytest.mark.parametrize(
    ("num_characters", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (66_000, "uint32")]
)
def test_ids_take_the_smallest_type(num_characters, dtype):
    """Guards against ids that wrap around, and against four bytes for each of 27 symbols."""
    text = "".join(chr(0x10000 + number) for number in range(num_characters))
    vocabulary = train("characters", text)
    ids = vocabulary.encode(text.encode())
    assert (vocabulary.size, ids.dtype) == (num_characters, dtype)
    assert ids.tolist() == list(range(num_characters))


@pytest.mark.parametrize(
    ("name", "end", "problem"),
    [
        ("characters", b"xz", r"not among the vocabulary's 2 characters: 'x' \(U\+0078\) 'z' \(U\+007A\)"),
        ("characters", b"\xff", "not UTF-8"),
        ("sentencepiece", b"\xff", "not UTF-8"),
    ],
)
def test_what_cannot_be_encoded_is_named_with_its_place(name, end, problem):
    """Guards against a KeyError or a UnicodeDecodeError, text that is silently repaired, and a place in characters."""
    with pytest.raises(EncodingError, match=f"{problem} at byte 3"):
        train(name, "aé").encode("éa".encode() + end)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [[-1], [0, 10_000]])
def test_an_id_outside_is_refused(name, bad):
    """Guards against negative ids that count from the end."""
    with pytest.raises(ValueError, match="lie outside"):
        train(name, "abc").decode(np.array(bad))


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_survives_json(name):
    """Guards against a run that reads its ids in another way than the corpus it was trained on."""
    vocabulary = train(name, AWKWARD)
    record = json.loads(json.dumps(vocabulary.to_dict()))
    assert vocabulary_from_dict(record) == vocabulary
    assert vocabulary_from_dict(record).decode(vocabulary.encode(AWKWARD.encode())) == AWKWARD.encode()
    assert vocabulary_from_dict(record) != (ByteVocabulary(utf8=False) if name == "bytes" else train(name, "abc"))


SOUND = {name: train(name, "abc").to_dict() for name in NAMES}
MODELS = {
    model: {"name": "sentencepiece", "model": base64.b64encode(model).decode(), "sha256": sha256(model).hexdigest()}
    for model in (b"", b"no model", b"\xff" * 100)
}
DAMAGED = [
    *({}, {"name": "bytes"}, {"name": "bytes", "utf8": 1}, {"name": "words", "utf8": True}, None),
    *(record | {"more": 1} for record in SOUND.values()),
    *(SOUND[name] | {"sha256": train(name, "abd").to_dict()["sha256"]} for name in NAMES[1:]),
    SOUND["characters"] | {"characters": "acb", "sha256": sha256(b"acb").hexdigest()},
    *MODELS.values(),
    MODELS[b"no model"] | {"model": "no base64!"},
]


@pytest.mark.parametrize("record", DAMAGED)
def test_a_record_that_is_none_of_a_vocabulary_is_refused(record):
    """Guards against symbols changed by hand or by a disk, a run of a later version read as if it were bytes, and
    tracebacks of the library."""
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(record)


def test_symbols_of_each_vocabulary():
    """Guards against counting bytes for characters: the same text, in the three vocabularies, counted by hand."""
    text = "né 世\n"  # 1 + 2 + 1 + 3 + 1 bytes
    byte, characters, pieces = (train(name, text) for name in NAMES)
    assert isinstance(byte, ByteVocabulary) and byte.encode(text.encode()).size == 8
    assert isinstance(characters, CharacterVocabulary) and characters.encode(text.encode()).size == 5
    assert characters.characters == "\n né世"
    assert isinstance(pieces, SentencePieceVocabulary) and pieces.encode(text.encode()).size == 5
    assert pieces.size == 1 + 256 + 5
    assert pieces.encode("é\u2581".encode()).size == 1 + 3
