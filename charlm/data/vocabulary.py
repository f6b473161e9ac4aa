"""Text <-> ids, without loss: what is decoded after encoding is the text, to the last byte."""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar, Protocol

import numpy as np

from charlm.config import DataConfig, UserError

CODE_POINTS = 0x110000
"""Of Unicode."""
FIRST_BYTE, FIRST_CHARACTER = 1, 257
"""Ids of sentencepiece: 0 is the unknown piece."""


class EncodingError(UserError):
    """Text that a vocabulary cannot express."""

    def __init__(self, problem: str, offset: int):
        """`offset`: the byte of the text at which the problem is."""
        super().__init__(f"{problem} at byte {offset:,}")
        self.problem, self.offset = problem, offset


class Vocabulary(Protocol):
    """What every vocabulary can do. Ids are 1-D arrays; text is bytes, so that nothing is lost."""

    name: ClassVar[str]

    @property
    def size(self) -> int:
        """V, the number of symbols."""

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of a text, in the type that `id_type` gives. Raises EncodingError where it has no symbol for it."""

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of some ids; the inverse of `encode`. Raises ValueError for an id outside [0, V)."""

    def count_characters(self, ids: np.ndarray) -> int:
        """Characters in the text of some ids. Counts of consecutive pieces add up to that of the whole."""

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes in the text of some ids."""

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, for `vocabulary_from_dict`."""


@dataclass(frozen=True)
class ByteVocabulary:
    """The 256 byte values, for any text (Al-Rfou et al. 2018 use it for text8 and enwik8 alike)."""

    name: ClassVar[str] = "bytes"
    size: ClassVar[int] = 256

    utf8: bool = True
    """Whether the text is UTF-8. If not, every byte counts as one character."""

    def encode(self, data: bytes) -> np.ndarray:
        """Bytes as uint8 ids."""
        return np.frombuffer(data, np.uint8).copy()  # PyTorch warns about arrays that cannot be written to

    def decode(self, ids: np.ndarray) -> bytes:
        """Ids as bytes."""
        return _checked(ids, self.size).astype(np.uint8).tobytes()

    def count_characters(self, ids: np.ndarray) -> int:
        """UTF-8 characters, counted at their first byte."""
        ids = np.asarray(ids)
        return int(np.count_nonzero(_starts_character(ids))) if self.utf8 else ids.size

    def count_bytes(self, ids: np.ndarray) -> int:
        """One for each id."""
        return np.asarray(ids).size

    def to_dict(self) -> dict[str, Any]:
        """Its name, and whether it counts UTF-8."""
        return {"name": self.name} | asdict(self)


class _SymbolTable:
    """What follows from a table of symbols, each of which is one character or one byte of a character."""

    symbols: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """V, the number of symbols."""
        return len(self.symbols)

    def decode(self, ids: np.ndarray) -> bytes:
        """The symbols' bytes, one after the other."""
        return b"".join(map(self.symbols.__getitem__, _checked(ids, self.size).tolist()))

    def count_characters(self, ids: np.ndarray) -> int:
        """Those that begin in the text, as a character may be spelled in several bytes."""
        return int(np.count_nonzero(self._starts_V[np.asarray(ids, np.int64)]))

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes of all symbols."""
        return int(self._lengths_V[np.asarray(ids, np.int64)].sum())

    @cached_property
    def _starts_V(self) -> np.ndarray:
        return _starts_character(np.array([symbol[0] for symbol in self.symbols], np.uint8))

    @cached_property
    def _lengths_V(self) -> np.ndarray:
        return np.array([len(symbol) for symbol in self.symbols])


@dataclass(frozen=True)
class CharacterVocabulary(_SymbolTable):
    """The characters of a text, ordered by code point."""

    name: ClassVar[str] = "characters"

    characters: str

    @classmethod
    def train(cls, counts: np.ndarray) -> "CharacterVocabulary":
        """All characters of a text, given how often each code point is in it."""
        return cls("".join(map(chr, np.flatnonzero(counts))))

    @cached_property
    def symbols(self) -> tuple[bytes, ...]:
        """The characters in UTF-8."""
        return tuple(map(str.encode, self.characters))

    def encode(self, data: bytes) -> np.ndarray:
        """One id for each character."""
        code_points = _code_points(data)
        ids = self._ids_of_code_points[code_points]
        if ids.size and ids.min() < 0:
            text = data.decode()
            position = int(ids.argmin())
            unknown, offset = text[position], len(text[:position].encode())
            problem = f"the character {unknown!r} (U+{ord(unknown):04X}) is not among the vocabulary's {self.size:,}"
            raise EncodingError(problem, offset)
        return ids.astype(id_type(self.size))

    def to_dict(self) -> dict[str, Any]:
        """Its characters in one string, and the SHA-256 of that in UTF-8."""
        data = self.characters.encode()
        return {"name": self.name, "characters": self.characters, "sha256": hashlib.sha256(data).hexdigest()}

    @cached_property
    def _ids_of_code_points(self) -> np.ndarray:
        return _inverse(self.symbols, first_id=0)


@dataclass(frozen=True)
class SentencePieceVocabulary(_SymbolTable):
    """A character model of the sentencepiece library with byte fallback: common characters, and bytes for the rest.

    The ids are the library's own. Encoding is a look-up here: that is faster, and exact where the library is not. It
    takes U+2581 for a space and an uncommon space for U+2581; here both are spelled in their own bytes.
    """

    name: ClassVar[str] = "sentencepiece"

    symbols: tuple[bytes, ...]
    """The text of each piece: of that for what is unknown, which no text holds and which reads U+FFFD; of the 256
    bytes; of the characters."""
    model: bytes = field(compare=False, repr=False)
    """As the library writes it; its releases may word the same symbols differently."""

    @classmethod
    def from_model(cls, model: bytes) -> "SentencePieceVocabulary":
        """What the library reads in a model.

        Raises:
            UserError: it is no model, or not one that `train` has made.
        """
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"vocabulary: not a sentencepiece model ({error})") from error
        pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        if pieces[:FIRST_CHARACTER] != ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
            raise UserError("vocabulary: not a sentencepiece model with byte fallback, which every text needs")
        symbols = ["\ufffd".encode(), *(bytes([byte]) for byte in range(256))]
        characters = [piece.replace("\u2581", " ") for piece in pieces[FIRST_CHARACTER:]]
        if len(set(characters)) < len(characters) or any(len(character) != 1 for character in characters):
            raise UserError("vocabulary: not a sentencepiece model of characters, each once")
        symbols += map(str.encode, characters)
        return cls(tuple(symbols), model)

    @classmethod
    def train(cls, counts: np.ndarray, character_coverage: float) -> "SentencePieceVocabulary":
        """The library's choice of characters, given how often each code point is in a text.

        A character model depends on nothing but these counts, so the library reads them in place of the text: each
        character with its frequency. So it needs little memory, and skips no long lines.

        Args:
            character_coverage: share of the text that the chosen characters make up, in [0.98, 1].
        """
        import sentencepiece

        counts = counts.copy()
        counts[[0x00, 0x09, 0x2581, 0x2585]] = 0  # the library's own marks: it reads them as something else
        if not counts.any():  # nothing to train on is an error there
            counts[0x20] = 1
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{chr(code)}\t{counts[code]}" for code in np.flatnonzero(counts)),
            input_format="tsv",
            model_writer=model,
            model_type="char",
            character_coverage=character_coverage,
            vocab_size=FIRST_CHARACTER + np.count_nonzero(counts),  # the most that there can be
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
        """One id for each character that has a piece, and one for each byte of the others."""
        code_points = _code_points(data)
        ids = self._ids_of_code_points[code_points]
        others = ids < 0
        spelled = np.frombuffer(code_points[others].tobytes().decode("utf-32-le").encode(), np.uint8)
        lengths = np.diff(np.flatnonzero(_starts_character(spelled)), append=len(spelled))
        repeats = np.ones_like(ids)
        repeats[others] = lengths
        ids = np.repeat(ids, repeats)
        ids[ids < 0] = spelled + np.int32(FIRST_BYTE)
        return ids.astype(id_type(self.size))

    def to_dict(self) -> dict[str, Any]:
        """The library's model in base64, and its SHA-256."""
        digest = hashlib.sha256(self.model).hexdigest()
        return {"name": self.name, "model": base64.b64encode(self.model).decode(), "sha256": digest}

    @cached_property
    def _ids_of_code_points(self) -> np.ndarray:
        return _inverse(self.symbols[FIRST_CHARACTER:], FIRST_CHARACTER)


def train_vocabulary(config: DataConfig, utf8: bool, texts: Iterable[bytes]) -> Vocabulary:
    """The vocabulary that the config asks for, made from the pieces of a training text, which end between characters.

    Args:
        utf8: whether the whole text is UTF-8.
    """
    if config.vocabulary == ByteVocabulary.name:
        return ByteVocabulary(utf8)
    counts = np.zeros(CODE_POINTS, np.int64)
    for text in texts:
        found = np.bincount(_code_points(text))
        counts[: len(found)] += found
    if config.vocabulary == CharacterVocabulary.name:
        return CharacterVocabulary.train(counts)
    return SentencePieceVocabulary.train(counts, config.character_coverage)


def vocabulary_from_dict(record: dict[str, Any]) -> Vocabulary:
    """The vocabulary that `to_dict` described.

    Raises:
        UserError: the record is not that of a vocabulary, or does not match its own SHA-256.
    """
    match record:
        case {"name": ByteVocabulary.name, "utf8": bool(utf8), **rest} if not rest:
            return ByteVocabulary(utf8)
        case {"name": CharacterVocabulary.name, "characters": str(characters), "sha256": digest, **rest} if not rest:
            _verify(characters.encode("utf-8", "surrogatepass"), digest)
            if characters != "".join(sorted(set(characters))) or any(map(_is_surrogate, characters)) or not characters:
                raise UserError("vocabulary: its characters are not in order, each once; restore provenance.json")
            return CharacterVocabulary(characters)
        case {"name": SentencePieceVocabulary.name, "model": str(model), "sha256": digest, **rest} if not rest:
            return SentencePieceVocabulary.from_model(_verify(_unpack(model), digest))
    raise UserError(f"vocabulary {str(record)[:80]}: not one that this version of charlm knows")


def id_type(size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids of a vocabulary of this size.

    Raises:
        UserError: none of those that ids are kept in does.
    """
    if size > 2**32:
        raise UserError(
            f"vocabulary of {size:,} symbols: ids have at most 32 bits; use one of at most {2**32:,} symbols"
        )
    return np.min_scalar_type(max(size - 1, 0))


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


def _starts_character(bytes_N: np.ndarray) -> np.ndarray:
    """Which bytes are the first of a UTF-8 character: all but the continuation bytes 0b10xxxxxx."""
    return bytes_N & 0b11000000 != 0b10000000


def _code_points(data: bytes) -> np.ndarray:
    try:
        return np.frombuffer(data.decode().encode("utf-32-le"), "<u4")
    except UnicodeDecodeError as error:
        raise EncodingError("not UTF-8", error.start) from None


def _inverse(characters: Sequence[bytes], first_id: int) -> np.ndarray:
    """The id of each code point, -1 where it has none; those of `characters` follow each other."""
    table = np.full(CODE_POINTS, -1, np.int32)
    table[_code_points(b"".join(characters))] = np.arange(first_id, first_id + len(characters))
    return table


def _checked(ids: np.ndarray, size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}; the vocabulary's lie in [0, {size})")
    return ids


def _verify(data: bytes, digest: Any) -> bytes:
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError("vocabulary: it is damaged, as its SHA-256 does not match; restore provenance.json")
    return data


def _unpack(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise UserError(f"vocabulary: it is damaged ({error}); restore provenance.json") from error
