"""The vocabularies: lossless for any text, counted as Python counts, and sentencepiece with the library's own ids."""

import base64
import hashlib
import json
import math
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

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
@given(text=st.text(), cut=st.integers(0))
@example(text=AWKWARD, cut=7)
@example(text="\n\n\n", cut=1)
@example(text="\0", cut=1)
def test_what_goes_in_comes_out(name, text, cut):
    """Guards against newlines, repeated spaces, tabs, NUL, CRLF, a byte-order mark or U+2581 that get lost on the way,
    and against counts that depend on where a text is cut into pieces."""
    vocabulary = train(name, text)
    ids = vocabulary.encode(text.encode())
    assert vocabulary.decode(ids) == text.encode()
    assert vocabulary.count_characters(ids) == len(text)
    assert ids.dtype == id_type(vocabulary.size)
    cut %= len(ids) + 1
    count = vocabulary.count_characters
    assert count(ids[:cut]) + count(ids[cut:]) == count(ids)
    assert type(count(ids)) is int  # JSON knows no np.int64


@given(st.binary())
def test_bytes_hold_anything(data):
    """Guards against any byte that is changed, dropped or added (newlines, NUL, CR, invalid UTF-8), and against
    PyTorch's warning about read-only arrays."""
    ids = ByteVocabulary().encode(data)
    assert (ids.dtype, ids.tolist(), ids.flags.writeable) == (np.uint8, list(data), True)
    assert ByteVocabulary().decode(ids.astype(np.int64)) == data


def test_bytes_that_are_not_utf8_are_characters():
    """Guards against a binary file whose bytes 0x80 to 0xbf count for nothing."""
    ids = np.arange(256, dtype=np.uint8)
    assert ByteVocabulary(utf8=False).count_characters(ids) == 256
    assert ByteVocabulary(utf8=True).count_characters(ids) == 256 - 64


@given(st.text(), st.text())
@example(AWKWARD, "abc")
@example("abc", AWKWARD)
def test_sentencepiece_expresses_what_it_was_not_trained_on(text, seen):
    """Guards against characters outside the vocabulary that are replaced by the unknown piece."""
    vocabulary = train("sentencepiece", seen)
    ids = vocabulary.encode(text.encode())
    assert vocabulary.decode(ids) == text.encode()
    assert 0 not in ids
    assert vocabulary.count_characters(ids) == len(text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581")), st.text(max_size=30))
@example(AWKWARD.replace("\u2581", ""), AWKWARD)
def test_the_ids_are_those_of_the_library(text, seen):
    """Guards against an encoder of our own that parts from sentencepiece where that is lossless: it takes U+2581 for a
    space, and spells a space that it has no piece for as U+2581."""
    vocabulary = train("sentencepiece", seen + " ")
    library = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    assert vocabulary.encode(text.encode()).tolist() == library.encode(text)
    assert library.decode(vocabulary.encode("a\u2581b".encode()).tolist()) == "a\u2581b"


def test_the_library_would_choose_the_same_characters_from_the_text():
    """Guards against a vocabulary that is trained on counts and differs from one trained on the text itself."""
    text = "".join(chr(0x61 + number) * (number**3 + 1) for number in range(26)) + "\u4e16" * 7 + " x y"
    for coverage in (1.0, 0.9995, 0.99, 0.98):
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text[start : start + 1000] for start in range(0, len(text), 1000)),
            model_writer=model,
            model_type="char",
            character_coverage=coverage,
            vocab_size=1000,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = {library.id_to_piece(i).replace("\u2581", " ") for i in range(257, library.vocab_size())}
        vocabulary = train("sentencepiece", text, coverage)
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


def test_an_unknown_character_is_named_with_its_place():
    """Guards against a KeyError, and against an offset in characters where one in bytes is meant."""
    vocabulary = train("characters", "aé")
    with pytest.raises(EncodingError, match=r"the character 'x' \(U\+0078\) is not among the vocabulary's 2") as error:
        vocabulary.encode("éaxéz".encode())
    assert error.value.offset == 3


@pytest.mark.parametrize("name", ["characters", "sentencepiece"])
def test_bytes_that_are_no_characters_are_named_with_their_place(name):
    """Guards against a UnicodeDecodeError, and against text that is silently repaired."""
    with pytest.raises(EncodingError, match="not UTF-8 at byte 3"):
        train(name, "abc").encode(b"abc\xffabc")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [[-1], [0, 10_000]])
def test_an_id_outside_is_refused(name, bad):
    """Guards against negative ids that count from the end."""
    with pytest.raises(ValueError, match="the vocabulary's lie in"):
        train(name, "abc").decode(np.array(bad))


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_survives_json(name):
    """Guards against a run that reads its ids in another way than the corpus it was trained on."""
    vocabulary = train(name, AWKWARD)
    record = json.loads(json.dumps(vocabulary.to_dict()))
    assert vocabulary_from_dict(record) == vocabulary
    assert vocabulary_from_dict(record).decode(vocabulary.encode(AWKWARD.encode())) == AWKWARD.encode()
    assert vocabulary_from_dict(record) != (ByteVocabulary(utf8=False) if name == "bytes" else train(name, "abc"))


@pytest.mark.parametrize(
    "record", [{}, {"name": "bytes"}, {"name": "bytes", "utf8": 1}, {"name": "words", "utf8": True}, None]
)
def test_an_unknown_vocabulary_is_refused(record):
    """Guards against reading a run of a later version, or a damaged one, as if it were bytes."""
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(record)


@pytest.mark.parametrize("name", ["characters", "sentencepiece"])
def test_a_damaged_vocabulary_is_refused(name):
    """Guards against a record whose symbols were changed by hand or by a disk."""
    record, other = train(name, "abc").to_dict(), train(name, "abd").to_dict()
    with pytest.raises(UserError, match="SHA-256"):
        vocabulary_from_dict(record | {"sha256": other["sha256"]})
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(record | {"more": 1})


@pytest.mark.parametrize("model", [b"", b"no model", b"\xff" * 100])
def test_what_is_no_model_is_refused(model):
    """Guards against a traceback from the library."""
    record = {"name": "sentencepiece", "sha256": hashlib.sha256(model).hexdigest()}
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(record | {"model": base64.b64encode(model).decode()})
    with pytest.raises(UserError, match="SHA-256"):
        vocabulary_from_dict(record | {"model": "no base64!"})


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
    assert math.isclose(np.log2(pieces.size), 8.0334230, abs_tol=1e-6)
