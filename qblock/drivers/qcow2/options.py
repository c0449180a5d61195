"""Options of the qcow2 driver, and how much memory its table caches get.

Models ``BlockdevOptionsQcow2`` and ``BlockdevCreateOptionsQcow2``. What qblock does not offer is declared, so that it is refused
with a reason and not as an unknown name.
"""

from __future__ import annotations

import errno
from typing import Final, Literal, NamedTuple, TypeAlias

import attrs

from qblock.drivers.qcow2.header import EXTENDED_L2, Header
from qblock.drivers.qcow2.storage import TEMPLATES, Area
from qblock.errors import BlockIOError, InvalidParameter
from qblock.options import ChildRef, DriverOptions, child, option, required
from qblock.permissions import ChildRole
from qblock.units import KiB, MiB, is_power_of_two

DEFAULT_L2_CACHE: Final = 32 * MiB
DEFAULT_CLEAN_INTERVAL: Final = 600
MIN_REFCOUNT_CLUSTERS: Final = 4
MOST_REFCOUNT_CLUSTERS: Final = (1 << 31) - 1
LONGEST_INTERVAL: Final = (1 << 32) - 1
MIN_L2_TABLES: Final = 2
MIN_CACHE_ENTRY: Final = 512

Template: TypeAlias = Literal["none", "constant", "cached", "all"]


@attrs.frozen
class OverlapChecks(DriverOptions):
    """``Qcow2OverlapCheckFlags``: a template, and areas switched on or off beside it."""

    template: Template | None = option(None, doc="which areas are protected unless said otherwise; default: cached")
    main_header: bool | None = option(None, doc="protect the header")
    active_l1: bool | None = option(None, doc="protect the active L1 table")
    active_l2: bool | None = option(None, doc="protect the L2 tables of the active L1 table")
    refcount_table: bool | None = option(None, doc="protect the refcount table")
    refcount_block: bool | None = option(None, doc="protect the refcount blocks")
    snapshot_table: bool | None = option(None, doc="protect the snapshot table")
    inactive_l1: bool | None = option(None, doc="protect the L1 tables of snapshots")
    inactive_l2: bool | None = option(None, doc="protect the L2 tables of snapshots")
    bitmap_directory: bool | None = option(None, doc="protect the bitmap directory", since="3.0")


@attrs.frozen
class Encryption(DriverOptions):
    """``BlockdevQcow2Encryption``. Differs from QEMU in that the format may be left out; it is the header's."""

    format: Literal["aes", "luks"] | None = option(None, doc="how the image is encrypted; default: by the header", since="2.10")
    key_secret: str | None = option(None, doc="id of the secret object with the passphrase", since="2.10")


@attrs.frozen
class Qcow2Options(DriverOptions):
    """``BlockdevOptionsQcow2``. Sizes are bytes."""

    file: ChildRef = child(ChildRole.STORAGE, doc="the image file")
    backing: ChildRef = child(
        ChildRole.BACKING, doc="the backing node, null for none; default: by the header", optional=True, nullable=True
    )
    lazy_refcounts: bool | None = option(None, doc="postpone refcount updates; default: by the header", since="1.7")
    pass_discard_request: bool | None = option(None, doc="pass guest discards to the file; default: with discard=unmap")
    pass_discard_snapshot: bool = option(True, doc="discard in the file what deleting a snapshot frees")
    pass_discard_other: bool = option(False, doc="discard in the file what else becomes free")
    discard_no_unref: bool = option(
        False, doc="clusters that the guest discards keep their places in the file; needs version 3", since="8.1"
    )
    overlap_check: OverlapChecks | Template | None = option(None, doc="protection of metadata; default: cached", since="2.2")
    cache_size: int | None = option(None, doc="size of L2 and refcount cache together", since="2.2")
    l2_cache_size: int | None = option(None, doc="size of the L2 cache; default: the whole image, at most 32 MiB", since="2.2")
    l2_cache_entry_size: int | None = option(None, doc="unit of the L2 cache, a power of two from 512", since="2.12")
    refcount_cache_size: int | None = option(None, doc="size of the refcount cache; default: 4 clusters", since="2.2")
    cache_clean_interval: int | None = option(None, doc="seconds after which unused tables are dropped; 0: never", since="2.5")
    encrypt: Encryption | None = option(None, doc="how to unlock an encrypted image", since="2.10")
    data_file: ChildRef = child(
        ChildRole.DATA, doc="the external data file; default: by the header", optional=True, since="4.0"
    )


@attrs.frozen
class EncryptionCreate(DriverOptions):
    """``QCryptoBlockCreateOptions``; all but the first two are for LUKS."""

    format: Literal["qcow", "luks"] = required(doc="qcow is the legacy AES")
    key_secret: str | None = option(None, doc="id of the secret object with the passphrase")
    cipher_alg: str | None = option(None, doc="cipher; default: aes-256")
    cipher_mode: str | None = option(None, doc="mode of the cipher; default: xts")
    ivgen_alg: str | None = option(None, doc="what vectors are made of; default: plain64")
    ivgen_hash_alg: str | None = option(None, doc="hash for the vectors of essiv; default: sha256")
    hash_alg: str | None = option(None, doc="hash for passphrases; default: sha256")
    iter_time: int | None = option(None, doc="milliseconds that unlocking is to take; default: 2000")


@attrs.frozen
class EncryptionAmend(DriverOptions):
    """``QCryptoBlockAmendOptionsLUKS``: which key slots are to be active or inactive."""

    state: Literal["active", "inactive"] = required(doc="active adds a passphrase, inactive erases key slots")
    new_secret: str | None = option(None, doc="id of the secret object with the passphrase to add")
    old_secret: str | None = option(None, doc="id of the secret object with the passphrase to erase")
    keyslot: int | None = option(None, doc="number of the key slot; default: a free one, or all with the old passphrase")
    iter_time: int | None = option(None, doc="milliseconds that unlocking is to take; default: 2000")


@attrs.frozen
class EncryptionChoice(DriverOptions):
    """``QCryptoBlockAmendOptions``: for LUKS those of `EncryptionAmend`; the legacy format has none."""

    format: Literal["qcow", "luks"] = required(doc="the image's own")
    state: Literal["active", "inactive"] | None = option(None, doc="active adds a passphrase, inactive erases key slots")
    new_secret: str | None = option(None, doc="id of the secret object with the passphrase to add")
    old_secret: str | None = option(None, doc="id of the secret object with the passphrase to erase")
    keyslot: int | None = option(None, doc="number of the key slot; default: a free one, or all with the old passphrase")
    iter_time: int | None = option(None, doc="milliseconds that unlocking is to take; default: 2000")

    def __attrs_post_init__(self) -> None:
        given = [name for name, value in attrs.asdict(self).items() if name != "format" and value is not None]
        if self.format == "luks" and self.state is None:
            raise InvalidParameter("options.encrypt.state", "is missing")
        if self.format != "luks" and given:
            member = given[0].replace("_", "-")
            raise InvalidParameter(f"options.encrypt.{member}", f"is unexpected for the format '{self.format}'")

    def for_luks(self) -> EncryptionAmend | None:
        """What to do to the key slots; None when the format is another one."""
        if self.state is None:
            return None
        members = attrs.asdict(self)
        del members["format"]
        return EncryptionAmend(**members)


@attrs.frozen
class Qcow2AmendOptions(DriverOptions):
    """``BlockdevAmendOptionsQcow2``."""

    encrypt: EncryptionChoice | None = option(None, doc="what to change about its encryption", since="5.1")


@attrs.frozen
class Qcow2CreateOptions(DriverOptions):
    """``BlockdevCreateOptionsQcow2``. Sizes are bytes."""

    file: ChildRef = child(ChildRole.STORAGE, doc="the node to create the image on")
    size: int = required(doc="size of the disk, a multiple of 512")
    data_file: ChildRef = child(ChildRole.DATA, doc="the node that is to hold the data", optional=True, since="4.0")
    data_file_raw: bool = option(False, doc="keep the data file usable as a raw image", since="4.0")
    extended_l2: bool = option(False, doc="entries of L2 tables with 32 subclusters", since="5.2")
    version: Literal["v2", "v3"] = option("v3", doc="v2 is compat 0.10, v3 is compat 1.1")
    backing_file: str | None = option(None, doc="name of the backing file")
    backing_fmt: str | None = option(None, doc="format of the backing file")
    encrypt: EncryptionCreate | None = option(None, doc="encryption of the disk", since="2.10")
    cluster_size: int = option(65536, doc="cluster size, a power of two from 512 to 2 MiB")
    preallocation: Literal["off", "metadata", "falloc", "full"] = option("off", doc="space reserved at once")
    lazy_refcounts: bool = option(False, doc="allow refcount updates to be postponed")
    refcount_bits: int = option(16, doc="width of refcounts, a power of two up to 64")
    compression_type: Literal["zlib", "zstd"] = option("zlib", doc="method for compressed clusters", since="5.1")


class CacheSizes(NamedTuple):
    """Bytes for L2 tables, for one cached L2 slice, and for refcounts; seconds between clean-ups (0: none)."""

    l2: int
    l2_entry: int | None
    refcount: int
    clean_interval: int


def cache_sizes(options: Qcow2Options, header: Header) -> CacheSizes:
    """What the cache options mean for this image; `InvalidParameter` when they contradict each other."""
    cluster = header.cluster_size
    entry = options.l2_cache_entry_size
    if entry is not None and (not is_power_of_two(entry) or not MIN_CACHE_ENTRY <= entry <= cluster):
        raise InvalidParameter("l2-cache-entry-size", f"must be a power of two from {MIN_CACHE_ENTRY} to the cluster size")
    for name in ("cache_size", "l2_cache_size", "refcount_cache_size", "cache_clean_interval"):
        if (getattr(options, name) or 0) < 0:
            raise InvalidParameter(name.replace("_", "-"), "must not be negative")
    total, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    least_refcount = MIN_REFCOUNT_CLUSTERS * cluster
    whole_image = -(-header.size // cluster) * (16 if header.has(EXTENDED_L2) else 8)
    if total is not None:
        if l2 is not None and refcount is not None:
            raise InvalidParameter("cache-size", "cannot be given together with both l2-cache-size and refcount-cache-size")
        if max(l2 or 0, refcount or 0) > total:
            raise InvalidParameter("cache-size", "must not be less than l2-cache-size or refcount-cache-size")
        if l2 is None:
            l2 = min(whole_image, total - (refcount if refcount is not None else min(least_refcount, total)))
        refcount = refcount if refcount is not None else total - l2
    l2 = l2 if l2 is not None else min(whole_image, DEFAULT_L2_CACHE)
    refcount = refcount if refcount is not None else max(least_refcount, 256 * KiB)
    if refcount // cluster > MOST_REFCOUNT_CLUSTERS:
        raise InvalidParameter("refcount-cache-size", f"must not be more than {MOST_REFCOUNT_CLUSTERS} clusters")
    interval = options.cache_clean_interval
    if interval is not None and interval > LONGEST_INTERVAL:
        raise InvalidParameter("cache-clean-interval", f"must not be more than {LONGEST_INTERVAL} seconds")
    return CacheSizes(
        max(l2, MIN_L2_TABLES * (entry or min(cluster, 64 * KiB))),
        entry,
        max(refcount, MIN_REFCOUNT_CLUSTERS * MIN_CACHE_ENTRY),
        DEFAULT_CLEAN_INTERVAL if interval is None else interval,
    )


def protected_areas(checks: OverlapChecks | str | None) -> frozenset[Area]:
    """Which areas an ``overlap-check`` option protects."""
    if checks is None or isinstance(checks, str):
        return frozenset(TEMPLATES[checks or "cached"])
    areas = set(TEMPLATES[checks.template or "cached"])
    for area in Area:
        wanted = getattr(checks, area.value.replace("-", "_"))
        if wanted is not None:
            (areas.add if wanted else areas.discard)(area)
    return frozenset(areas)


def refuse_unsupported(options: Qcow2Options | Qcow2CreateOptions) -> None:
    """Raise for options that stand for features of the format that qblock does not offer."""


def refuse_for_v2(options: Qcow2Options, header: Header, image: str) -> None:
    """``lazy-refcounts=on`` needs the dirty bit, ``discard-no-unref=on`` zero clusters with a place: version 2 lacks both."""
    if header.version < 3:
        if options.lazy_refcounts:
            raise BlockIOError(errno.EINVAL, f"'{image}' is of version 2 (compat 0.10), which has no lazy refcounts")
        if options.discard_no_unref:
            raise BlockIOError(
                errno.EINVAL, f"'{image}' is of version 2 (compat 0.10), in which discarded clusters cannot keep their places"
            )
