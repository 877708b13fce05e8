"""Decompression: by content, in bounded memory, with every window that compressors write."""

import bz2
import gzip
import lzma
import tracemalloc

import pytest
import zstandard

from llada_megatron.llada_moe.data import streams
from llada_megatron.llada_moe.data.streams import DAMAGED, compression_of, open_stream

PACK = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


def unpacked(path):
    with open_stream(path) as stream:
        return stream.read()


@pytest.mark.parametrize("ending", PACK)
def test_content_decides_not_the_name(tmp_path, ending):
    text = b"some text\n" * 1000
    for name in (f"a.{ending}", f"a.{ending.upper()}", "without"):
        (tmp_path / name).write_bytes(PACK[ending](text) + PACK[ending](b"more"))
        assert unpacked(tmp_path / name) == text + b"more"
    (tmp_path / f"b.{ending}").write_bytes(text)
    with pytest.raises(DAMAGED, match="not compressed with .* though its name says so"):
        unpacked(tmp_path / f"b.{ending}")
    (tmp_path / f"c.{ending}").write_bytes(PACK[ending](text)[:-9])
    with pytest.raises(DAMAGED):
        unpacked(tmp_path / f"c.{ending}")
    assert compression_of(PACK[ending](b"")) and not compression_of(b"BZh9 is a word") and not compression_of(b"")


def test_zstd_with_the_longest_window(tmp_path):
    # a frame of `zstd --ultra --long=31`: magic, no content size, window descriptor 2^31, one raw block as the last
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress(frame)
    (tmp_path / "a").write_bytes(frame)
    assert unpacked(tmp_path / "a") == b"abc"


def test_zstd_passes_over_skippable_frames(tmp_path):
    (tmp_path / "a").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(b"text"))
    assert unpacked(tmp_path / "a") == b"text"


def test_small_file_with_much_text_takes_little_memory(tmp_path):
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    block = b'{"text": "abc"}\n' * 65536
    (tmp_path / "a.zst").write_bytes(b"".join(packer.compress(block) for _ in range(256)) + packer.flush())
    assert (tmp_path / "a.zst").stat().st_size < 50_000  # 256 MiB of text
    with open_stream(tmp_path / "a.zst") as stream:
        tracemalloc.start()
        try:
            size = sum(len(stream.read(streams.BUFFER)) for _ in range(256))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert size == 256 << 20 and peak < 100 << 20
