"""Text <-> ids, without loss: decoding what was encoded gives the same bytes."""

import base64
import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from charlm.config import DataConfig, UserError

CODE_POINTS = sys.maxunicode + 1


class EncodingError(UserError):
    """The vocabulary cannot express a text; `offset` is that of the first byte at fault."""

    def __init__(self, problem: str, offset: int):
        super().__init__(f"{problem} at byte {offset:,}")
        self.problem, self.offset = problem, offset


class Vocabulary(ABC):
    """A table of symbols, each a character or one byte of one. Ids are 1-D arrays; text is bytes."""

    name: ClassVar[str]
    symbols: tuple[bytes, ...]
    first_character: ClassVar[int] = 0
    """The id from which on all symbols are characters."""

    @property
    def size(self) -> int:
        """V, the number of symbols."""
        return len(self.symbols)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record, which `vocabulary_from_dict` reads."""

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of a text, of type `id_type(V)`. Raises EncodingError if it cannot be expressed."""
        ids = self._ids_of_code_points[_code_points(data)]
        if ids.size and ids.min() < 0:
            text = data.decode()
            position = int(ids.argmin())
            offset = len(text[:position].encode())
            missing = sorted({text[place] for place in np.flatnonzero(ids < 0)})[:20]
            shown = " ".join(f"{one!r} (U+{ord(one):04X})" for one in missing)
            raise EncodingError(f"not among the vocabulary's {self.size:,} characters: {shown}", offset)
        return ids.astype(id_type(self.size))

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of some ids. Raises ValueError for an id outside [0, V)."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(f"some of the ids lie outside [0, {self.size})")
        return b"".join(map(self.symbols.__getitem__, ids.tolist()))

    def count_characters(self, ids: np.ndarray) -> int:
        """Characters that start in the text of some ids; counts of pieces add up."""
        return int(np.count_nonzero(self.starts(ids)))

    def starts(self, ids: np.ndarray) -> np.ndarray:
        """A mask of the ids whose symbols start a character."""
        return self._starts_V[ids]

    def begins(self, ids: np.ndarray) -> np.ndarray:
        """The places in some ids at which characters begin; the rest of one at the start counts as one."""
        return np.flatnonzero(self.starts(ids) | (np.arange(len(ids)) == 0))

    @cached_property
    def _ids_of_code_points(self) -> np.ndarray:
        characters = b"".join(self.symbols[self.first_character :])
        table = np.full(CODE_POINTS, -1, np.int32)  # -1 where there is none
        table[_code_points(characters)] = np.arange(self.first_character, self.size)
        return table

    @cached_property
    def _starts_V(self) -> np.ndarray:
        return _starts_character(np.array([symbol[0] for symbol in self.symbols], np.uint8))


@dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """The 256 byte values, for any text (Al-Rfou et al. 2018 use it for text8 and enwik8)."""

    name: ClassVar[str] = "bytes"
    symbols: ClassVar[tuple[bytes, ...]] = tuple(bytes([byte]) for byte in range(256))

    utf8: bool = True
    """Whether the text is UTF-8. If not, every byte counts as one character."""

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).copy()  # PyTorch warns about read-only arrays

    def starts(self, ids: np.ndarray) -> np.ndarray:
        return super().starts(ids) if self.utf8 else np.full(len(ids), True)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "utf8": self.utf8}


@dataclass(frozen=True)
class CharacterVocabulary(Vocabulary):
    """The characters of a text, ordered by code point."""

    name: ClassVar[str] = "characters"

    characters: str

    @cached_property
    def symbols(self) -> tuple[bytes, ...]:
        return tuple(map(str.encode, self.characters))

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.characters.encode()).hexdigest()
        return {"name": self.name, "characters": self.characters, "sha256": digest}


@dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    """A character model of sentencepiece: common characters, and bytes for the rest.

    The ids are the library's, looked up in a table: it confuses U+2581 with a space.
    """

    name: ClassVar[str] = "sentencepiece"
    first_character: ClassVar[int] = 257

    symbols: tuple[bytes, ...]
    """U+FFFD for the unknown piece, which is never used; the 256 bytes; the characters."""
    model: bytes = field(compare=False, repr=False)
    """The library's model file, which releases may write differently."""

    @classmethod
    def from_model(cls, model: bytes) -> "SentencePieceVocabulary":
        """The vocabulary of a model file. Raises ValueError unless `train` could have made it."""
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        expected = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        characters = [piece.replace("\u2581", " ") for piece in pieces[cls.first_character :]]
        if pieces[: cls.first_character] != expected or any(len(one) != 1 for one in characters):
            raise ValueError("its sentencepiece model is not one of characters with byte fallback")
        return cls(("\ufffd".encode(), *ByteVocabulary.symbols, *map(str.encode, characters)), model)

    @classmethod
    def train(cls, counts: np.ndarray, character_coverage: float) -> "SentencePieceVocabulary":
        """Let the library choose the characters of a share in [0.98, 1] of a text, from their counts."""
        import sentencepiece

        counts[[0x00, 0x09, 0x2581, 0x2585]] = 0  # marks of the library
        if not counts.any():  # the library cannot be trained on nothing
            counts[0x20] = 1
        codes = np.flatnonzero(counts)
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{chr(code)}\t{counts[code]}" for code in codes),
            input_format="tsv",
            model_writer=model,
            model_type="char",
            character_coverage=character_coverage,
            vocab_size=cls.first_character + len(codes),  # the upper bound
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        return cls.from_model(model.getvalue())

    def encode(self, data: bytes) -> np.ndarray:
        ids = self._ids_of_code_points[_code_points(data)]
        bytes_N = np.frombuffer(data, np.uint8)
        starts_N = _starts_character(bytes_N)
        ids_N = ids[np.cumsum(starts_N) - 1]
        spelled_N = ids_N < 0
        ids_N = np.where(spelled_N, bytes_N + np.int32(1), ids_N)  # id 0 is the unknown piece
        return ids_N[starts_N | spelled_N].astype(id_type(self.size))

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.model).hexdigest()
        return {"name": self.name, "model": base64.b64encode(self.model).decode(), "sha256": digest}


def train_vocabulary(config: DataConfig, utf8: bool, texts: Iterable[bytes]) -> Vocabulary:
    """The vocabulary that the config names, from a training text in pieces of whole characters."""
    if config.vocabulary == ByteVocabulary.name:
        return ByteVocabulary(utf8)
    counts = np.zeros(CODE_POINTS, np.int64)
    if config.characters is not None:  # in the order of their ids
        codes = _code_points(config.characters.encode())
        counts[codes] = np.arange(len(codes), 0, -1)
        config, texts = config.replace(character_coverage=1.0), ()
    for text in texts:
        counts += np.bincount(_code_points(text), minlength=CODE_POINTS)
    if config.vocabulary == CharacterVocabulary.name:
        return CharacterVocabulary("".join(map(chr, np.flatnonzero(counts))))
    return SentencePieceVocabulary.train(counts, config.character_coverage)


def vocabulary_from_dict(record: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a record made by `to_dict`. Raises UserError if it is damaged or unknown."""
    try:
        match record:
            case {"name": ByteVocabulary.name, "utf8": bool(utf8)}:
                vocabulary = ByteVocabulary(utf8)
            case {"name": CharacterVocabulary.name, "characters": str(text)} if text:
                vocabulary = CharacterVocabulary("".join(sorted(set(text))))
            case {"name": SentencePieceVocabulary.name, "model": str(model)} if model:
                vocabulary = SentencePieceVocabulary.from_model(base64.b64decode(model))
            case _:
                raise UserError(f"vocabulary {str(record)[:80]}: not one that this version knows")
        if vocabulary.to_dict() != record:
            raise ValueError("another SHA-256")
    except (ValueError, RuntimeError) as error:  # sentencepiece raises RuntimeError
        raise UserError("vocabulary: damaged; restore provenance.json") from error
    return vocabulary


def id_type(size: int) -> np.dtype:
    """The smallest unsigned type for the ids of a vocabulary of this size."""
    return np.min_scalar_type(max(size - 1, 0))


def whole_characters(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in blocks that end between characters, if it is UTF-8."""
    rest = b""
    for block in blocks:
        text = rest + block
        end = last_start(text)
        yield text[:end]
        rest = text[end:]
    yield rest


def last_start(text: bytes | np.ndarray) -> int:
    """The start of the last UTF-8 character; the end of the text if none starts in the last 4 bytes."""
    tail = np.frombuffer(text[-4:], np.uint8)
    starts = np.flatnonzero(_starts_character(tail))
    last = int(starts[-1]) if starts.size else len(tail)
    return len(text) - len(tail) + last


def _starts_character(bytes_N: np.ndarray) -> np.ndarray:
    """A mask of the bytes that start a UTF-8 character: all except 0b10xxxxxx."""
    return bytes_N & 0b11000000 != 0b10000000


def _code_points(data: bytes) -> np.ndarray:
    try:
        return np.frombuffer(data.decode().encode("utf-32-le"), "<u4")
    except UnicodeDecodeError as error:
        raise EncodingError("not UTF-8", error.start) from None
