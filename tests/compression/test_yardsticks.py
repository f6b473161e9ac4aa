"""Other compressors, by texts whose compressed size is known beforehand."""

import numpy as np

from charlm.compression.report import compressed_sizes


def test_sizes_of_noise_and_of_a_long_period():
    """Guards against bits in place of bytes, pieces that are lost, and a compressor that is not at its best."""
    noise = np.random.default_rng(0).bytes(100_000)
    assert all(1 < size / 100_000 < 1.02 for size in compressed_sizes([noise[:30_000], noise[30_000:]]).values())
    # A period of 50,000 is beyond gzip's window of 32 KiB, but within bzip2's block of 900 kB and xz's dictionary.
    sizes = compressed_sizes([noise[:50_000]] * 4)
    assert sizes["gzip -9"] > 200_000 > 80_000 > sizes["bzip2 -9"] > sizes["xz -9e"]
