"""The layout of a compressed file, and the digests of what encoder and decoder must share.

    charlm, format version      6 bytes, uint16
    header                      see `Header`; its last field is a text of up to 255 bytes
    settings, in version 5      up to 255 bytes of JSON: the values of `adapt`, or null, and of `experts`
    blocks                      each: uint32 W, then W words of 32 bits from the range coder
    checksum                    the first 8 bytes of the SHA-256 of everything before

Numbers are little-endian. The checksum finds damage before anything is decoded; the header's SHA-256
proves the content. The header must suit the file's size.
"""

import hashlib
import json
import math
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import BinaryIO, NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor

from charlm.compression.streams import FAMILY, CodingSettings, Streams, probabilities
from charlm.config import UserError
from charlm.config.adapt import AdaptConfig
from charlm.data.vocabulary import Vocabulary
from charlm.files import parse_json
from charlm.runs.checkpoints import digest
from charlm.runs.trained import TrainedModel

MAGIC = b"charlm"
VERSIONS = PLAIN, LEARNING = 3, 5
"""PLAIN is written where the model does not learn and is not mixed with experts. Version 4 is given up."""
PRECISIONS = ("fp32", "bf16", "fp16")
"""A file holds the index of one: keep the order."""
CODER_BITS = 24
"""The coder counts probabilities in units of 2^-24; every symbol gets at least one unit."""
_PREFIX = struct.Struct("<6sH")
_FIELDS = struct.Struct("<QQ32s16s8s8sIIIIHBB")
"""The fields of `Header` and of its settings, then the length of the environment."""
_COUNT = struct.Struct("<I")
_CHECKSUM_BYTES = 8
_PIECE = 2**20


class Header(NamedTuple):
    """Facts that decoder and encoder share."""

    length: int
    """Bytes of the content."""
    symbols: int
    content: bytes
    """SHA-256 of the content."""
    model: bytes
    vocabulary: bytes
    probe: bytes
    settings: CodingSettings
    environment: str

    def block_sizes(self) -> Iterator[int]:
        """The number of symbols in each block."""
        for begin in range(0, self.symbols, self.settings.block):
            yield min(self.settings.block, self.symbols - begin)

    def pack(self) -> bytes:
        """The file up to its first block."""
        *facts, settings, environment = self
        *sizes, precision, adapt, experts = dict(settings).values()
        text = environment.encode()[:255]
        packed = _FIELDS.pack(*facts, *sizes, PRECISIONS.index(precision), len(text)) + text
        if adapt is None and not experts:
            return _PREFIX.pack(MAGIC, PLAIN) + packed
        values = [adapt and list(dict(adapt).values()), experts]
        text = json.dumps(values, separators=(",", ":")).encode()
        return _PREFIX.pack(MAGIC, LEARNING) + packed + bytes([len(text)]) + text


def pack_block(words: np.ndarray) -> bytes:
    """A block of uint32 [W] as it stands in the file."""
    return _COUNT.pack(len(words)) + words.astype("<u4").tobytes()


def checksum(file: BinaryIO, size: int) -> bytes:
    """The checksum of the first `size` bytes; the file is left behind them."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(min(_PIECE, max(0, size - file.tell()))):
        digest.update(piece)
    return digest.digest()[:_CHECKSUM_BYTES]


def read_header(file: BinaryIO, name: str, vocabulary_size: int) -> Header:
    """The header of a whole file, left at its first block; UserError for any other."""
    end = file.seek(0, os.SEEK_END) - _CHECKSUM_BYTES
    file.seek(0)
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC) or len(prefix) < _PREFIX.size:
        raise UserError(f"{name}: not a file that charlm has compressed")
    _, number = _PREFIX.unpack(prefix)
    if number not in VERSIONS:
        problem = f"has format version {number}, not {' or '.join(map(str, VERSIONS))}"
        raise UserError(f"{name}: {problem}; use the charlm that wrote it")
    try:
        header = _unpack(file, end, number)
        first_block = file.tell()
        _check_blocks(file, end, header, max(2, vocabulary_size))
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{name}: its header claims {error}; get a whole copy") from None
    if checksum(file, end) != file.read(_CHECKSUM_BYTES):  # last: it may be a terabyte of zeros
        raise UserError(f"{name}: is damaged or cut short; get a whole copy")
    file.seek(first_block)
    return header


def read_block(file: BinaryIO) -> np.ndarray:
    """The next block's words, uint32 [W], in the processor's byte order."""
    (count,) = _COUNT.unpack(file.read(_COUNT.size))
    return np.frombuffer(file.read(4 * count), "<u4").astype(np.uint32)


def largest_claim(words: int, vocabulary_size: int) -> int:
    """The most symbols that so many words hold, at least one: each leaves V - 1 units to the others."""
    bits_per_symbol = -math.log2(1 - (vocabulary_size - 1) / 2**CODER_BITS)
    return math.floor((32 * words + 64) / bits_per_symbol) if words else 0


def _unpack(file: BinaryIO, end: int, version: int) -> Header:
    """The header; errors say what it claims."""
    packed = file.read(_FIELDS.size)
    if len(packed) < _FIELDS.size or file.tell() + packed[-1] > end:
        raise ValueError("more bytes than the file has")
    *values, precision, length = _FIELDS.unpack(packed)
    word = PRECISIONS[precision] if precision < len(PRECISIONS) else f"number {precision}"
    settings = dict(zip(CodingSettings.model_fields, [*values[6:], word], strict=False))
    environment = file.read(length).decode(errors="backslashreplace")
    if version == LEARNING:
        adapt, experts = parse_json(file.read(int.from_bytes(file.read(1))))
        adapt = adapt and dict(zip(AdaptConfig.model_fields, adapt, strict=True))
        settings |= {"adapt": adapt, "experts": experts}
    header = Header(*values[:6], CodingSettings.read(settings), environment)
    if not header.symbols <= header.length <= 4 * header.symbols:
        raise ValueError(f"{header.length:,} bytes in {header.symbols:,} symbols")
    return header


def _check_blocks(file: BinaryIO, end: int, header: Header, vocabulary_size: int) -> None:
    """Raise ValueError unless the blocks up to `end` can hold the symbols claimed."""
    for symbols in header.block_sizes():
        count = int.from_bytes(file.read(_COUNT.size), "little")
        if file.tell() + 4 * count > end:
            raise ValueError(f"{header.symbols:,} symbols, and the file ends before them")
        too_many = symbols > largest_claim(count, vocabulary_size)
        if too_many or 32 * count > CODER_BITS * symbols + 64:
            raise ValueError(f"{symbols:,} symbols in {4 * count:,} bytes")
        file.seek(4 * count, os.SEEK_CUR)
    if file.tell() != end:
        raise ValueError(f"{header.symbols:,} symbols, and more bytes follow")


def model_digest(trained: TrainedModel) -> bytes:
    """16 bytes that identify the model's shape and `predicting_tensors`."""
    shape = trained.config.model.model_dump(exclude={"head_bias"})  # the tensors say it
    shape["positions"] = shape.pop("position_encoding")  # as in older files
    hashed = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor in predicting_tensors(trained).items():
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous()
        hashed.update(values.view(torch.uint8).numpy().data)
    return hashed.digest()[:16]


def predicting_tensors(trained: TrainedModel) -> dict[str, Tensor]:
    """The parameters that predict the next symbol, by name."""
    model = trained.config.model
    with torch.inference_mode():
        nothing_11D = torch.zeros(1, 1, model.d_model, device=trained.device)
        _, weight, bias = trained.heads.classifiers(nothing_11D, model.num_layers, (1,))
    head = {"head.weight": weight, "head.bias": bias}
    return dict(sorted((trained.transformer.state_dict() | head).items()))


def vocabulary_digest(vocabulary: Vocabulary) -> bytes:
    """8 bytes that identify the vocabulary."""
    return bytes.fromhex(digest(vocabulary.to_dict()))[:8]


def environment(device: torch.device, experts: Sequence[str] = ()) -> str:
    """Versions, device and processor: the last bits of a probability depend on them."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", lambda _: platform.machine())(device)
        runtime = torch.version.hip or getattr(torch.version, device.type, platform.release())
        place = f"{name} {device.type} {runtime}"
    else:
        found = getattr(torch.cpu, "get_capabilities", dict)()  # older torch lacks it
        # Not the numbers of cores and sockets.
        features = {name: value for name, value in found.items() if not name.startswith("num_")}
        kernels = torch.backends.cpu.get_cpu_capability()
        place = f"{device.type} {platform.machine()} {kernels} {digest(features)[:8]}"
    packages = ("constriction", "numba") if experts else ("constriction",)
    versions = [f"{package} {version(package)}" for package in packages if find_spec(package)]
    return ", ".join([f"torch {torch.__version__}", *versions, place])


def probe(trained: TrainedModel, settings: CodingSettings) -> bytes:
    """8 bytes that identify the arithmetic by logits and code words."""
    context = min(settings.context, 16)
    experts = [name for name in settings.experts if name != "train"]  # its counts take minutes
    streams = Streams(trained, settings.replace(context=context, stride=1, experts=experts))
    encoder = constriction.stream.queue.RangeEncoder()
    hashed = hashlib.sha256()
    shape = (context + 2, settings.streams)
    random_NS = np.random.Philox(key=0).random_raw(shape) % trained.vocabulary.size
    for symbols_S in random_NS:
        logits_SV = streams.append(symbols_S)
        hashed.update(logits_SV.cpu().numpy().tobytes())
        encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
    hashed.update(encoder.get_compressed().astype("<u4").tobytes())
    return hashed.digest()[:8]
