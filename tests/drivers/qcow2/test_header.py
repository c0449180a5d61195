"""The header: what is read is what was written, and nothing hostile passes."""

from __future__ import annotations

import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.header import Extension, Header, encode_header, feature_names, parse_header, validate
from qblock.errors import BlockIOError, CorruptImage, ImageError, NotThisFormat, UnsupportedFeature

PLAIN = Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_size=2,
    l1_offset=3 << 16,
    refcount_table_offset=1 << 16,
    refcount_table_clusters=1,
)
FILE_LENGTH = 4 << 16


def padded(header: Header) -> bytes:
    return encode_header(header).ljust(header.cluster_size, b"\0")


@given(
    st.sampled_from([2, 3]),
    st.none() | st.text(min_size=1, max_size=60).filter(lambda name: "\0" not in name),
    st.none() | st.sampled_from(["raw", "qcow2"]),
    st.lists(st.tuples(st.integers(1, 2**32 - 1), st.binary(max_size=40)), max_size=4),
    st.binary(max_size=16).map(lambda tail: tail[: len(tail) // 8 * 8]),
)
def test_what_is_written_is_read_back(
    version: int, backing: str | None, fmt: str | None, extensions: list[tuple[int, bytes]], tail: bytes
) -> None:
    """Unknown extensions and header bytes that are not understood are kept as they are."""
    unknown = tuple(Extension(kind, data) for kind, data in extensions if kind not in head.EXT_ORDER)
    length = head.V2_LENGTH if version == 2 else head.V3_LENGTH + len(tail)
    header = attrs.evolve(
        PLAIN, version=version, extensions=unknown, header_length=length, tail=b"" if version == 2 else tail
    ).with_backing(backing, fmt)
    again = parse_header(padded(header), "image")
    assert again.backing_file == backing and again.backing_format == fmt
    assert set(again.extensions) == set(header.extensions)
    assert attrs.evolve(again, extensions=()) == attrs.evolve(header, extensions=())


def test_a_backing_name_that_does_not_fit_is_refused_and_nothing_is_cut() -> None:
    """A header has one cluster; with 512 bytes it is soon full."""
    small = attrs.evolve(PLAIN, cluster_bits=9, extensions=())
    assert len(encode_header(small.with_backing("x" * 380, None))) <= 512
    with pytest.raises(BlockIOError) as refused:
        encode_header(small.with_backing("x" * 400, None))
    assert refused.value.errno == 28


def test_a_feature_is_named_by_the_table_of_the_image_itself() -> None:
    """The image tells what a bit that we have never heard of means."""
    table = struct.pack(">BB46s", 0, 40, b"time travel")
    header = attrs.evolve(PLAIN, incompatible=1 << 40 | 1 << 41, extensions=(Extension(head.EXT_FEATURE_TABLE, table),))
    assert list(feature_names(header, 0, header.incompatible)) == ["time travel", "unknown incompatible feature 20000000000"]
    with pytest.raises(UnsupportedFeature, match="time travel"):
        validate(header, FILE_LENGTH, "image")


BAD_FIELDS = {
    "cluster size": (20, ">I", 22),
    "small clusters": (20, ">I", 8),
    "huge L1": (36, ">I", 0xFFFFFFFF),
    "L1 too small": (36, ">I", 1),
    "size": (24, ">Q", 1 << 63),
    "unaligned L1": (40, ">Q", (3 << 16) + 512),
    "L1 behind the end": (40, ">Q", 1 << 50),
    "L1 on the header": (40, ">Q", 0),
    "L1 on the refcount table": (40, ">Q", 1 << 16),
    "refcount table on the header": (48, ">Q", 0),
    "refcount table behind the end": (48, ">Q", 1 << 60),
    "no refcount table": (56, ">I", 0),
    "huge refcount table": (56, ">I", 0xFFFFFFFF),
    "refcount width": (96, ">I", 7),
    "header length": (100, ">I", 105),
    "long header": (100, ">I", 1 << 20),
    "short header": (100, ">I", 96),
    "backing name": (8, ">QI", (1 << 15, 1024)),
    "backing outside": (8, ">QI", (1 << 40, 10)),
    "encryption": (32, ">I", 3),
    "luks without its header": (32, ">I", 2),
    "unknown feature": (72, ">Q", 1 << 63),
    "compression type": (104, ">B", 7),
    "compression type without its bit": (104, ">B", 1),
    "compression bit without the type": (72, ">Q", 1 << 3),
    "version": (4, ">I", 4),
    "endless extension": (112, ">II", (0x12345678, 0xFFFFFFF0)),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_field_out_of_its_limits_is_refused(name: str) -> None:
    """Before anything is allocated or read by it."""
    offset, code, value = BAD_FIELDS[name]
    raw = bytearray(padded(PLAIN))
    struct.pack_into(code, raw, offset, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(ImageError):
        validate(parse_header(bytes(raw), "image"), FILE_LENGTH, "image")


def test_the_plain_header_is_fine() -> None:
    """The damaged ones above fail for their damage only."""
    validate(parse_header(padded(PLAIN), "image"), FILE_LENGTH, "image")


@pytest.mark.parametrize("length", [0, 3, 71, 103])
def test_a_header_cut_short_is_no_image(length: int) -> None:
    """Truncated files are told apart from damaged ones where that is possible."""
    with pytest.raises((NotThisFormat, CorruptImage)):
        parse_header(padded(PLAIN)[:length], "image")


@given(st.binary(min_size=72, max_size=300))
def test_noise_behind_the_magic_raises_image_errors_only(noise: bytes) -> None:
    """No struct.error, no IndexError, no MemoryError."""
    try:
        validate(parse_header(b"QFI\xfb\0\0\0\3" + noise, "image"), 1 << 20, "image")
    except ImageError:
        pass
