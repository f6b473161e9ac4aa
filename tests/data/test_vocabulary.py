"""Bytes as a vocabulary: lossless, and counted as Python counts."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.config import UserError
from charlm.data.vocabulary import ByteVocabulary, vocabulary_from_dict


@given(st.binary())
def test_what_goes_in_comes_out(data):
    """Guards against any byte that is changed, dropped or added on the way: newlines, NUL, CR, invalid UTF-8."""
    ids = ByteVocabulary().encode(data)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(data)
    assert ByteVocabulary().decode(ids) == data


def test_ids_can_be_written_to():
    """Guards against torch.from_numpy's warning about read-only arrays."""
    assert ByteVocabulary().encode(b"abc").flags.writeable


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_ids_of_any_type_decode(dtype):
    """Guards against eight bytes per id when a model's int64 ids are decoded."""
    assert ByteVocabulary().decode(np.array([0, 104, 255], dtype)) == b"\x00h\xff"
    assert ByteVocabulary().decode([]) == b""


@pytest.mark.parametrize("ids", [[256], [0, -1]])
def test_an_id_that_is_no_byte_is_refused(ids):
    """Guards against ids that silently wrap around to another byte."""
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        ByteVocabulary().decode(np.array(ids))


@given(st.text(), st.integers(0))
def test_characters_are_counted_as_python_counts_them(text, cut):
    """Guards against bytes per character that are off in other scripts, and against counts that change when a text is
    counted in pieces, whose borders may fall inside a character."""
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text.encode())
    cut = cut % (len(ids) + 1)
    assert vocabulary.count_characters(ids) == len(text)
    assert vocabulary.count_characters(ids[:cut]) + vocabulary.count_characters(ids[cut:]) == len(text)
    assert type(vocabulary.count_characters(ids)) is int  # JSON knows no np.int64


def test_bytes_that_are_not_utf8_are_characters():
    """Guards against a binary file whose bytes 0x80 to 0xbf count for nothing."""
    ids = np.arange(256, dtype=np.uint8)
    assert ByteVocabulary(utf8=False).count_characters(ids) == 256
    assert ByteVocabulary(utf8=True).count_characters(ids) == 256 - 64


@pytest.mark.parametrize("utf8", [True, False])
def test_a_vocabulary_survives_json(utf8):
    """Guards against a run that counts characters in another way than the corpus it was trained on."""
    vocabulary = ByteVocabulary(utf8)
    assert vocabulary_from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


@pytest.mark.parametrize(
    "record", [{}, {"name": "bytes"}, {"name": "bytes", "utf8": 1}, {"name": "words", "utf8": True}, None]
)
def test_an_unknown_vocabulary_is_refused(record):
    """Guards against reading a run of a later version, or a damaged one, as if it were bytes."""
    with pytest.raises(UserError, match="vocabulary"):
        vocabulary_from_dict(record)
