"""Other compressors, for comparison with a model's bits per byte and with the files that it compresses."""

import bz2
import lzma
import zlib
from collections.abc import Iterable

COMPRESSORS = {
    "gzip -9": lambda: zlib.compressobj(9, wbits=31),  # within 0.2 % of the program's size
    "bzip2 -9": lambda: bz2.BZ2Compressor(9),
    "xz -9e": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
}


def compressed_sizes(pieces: Iterable[bytes]) -> dict[str, int]:
    """The size in bytes that each of `COMPRESSORS` needs for the concatenated pieces."""
    packers = {name: make() for name, make in COMPRESSORS.items()}
    sizes = dict.fromkeys(COMPRESSORS, 0)
    for piece in pieces:
        for name, packer in packers.items():
            sizes[name] += len(packer.compress(piece))
    return {name: size + len(packers[name].flush()) for name, size in sizes.items()}
