"""The properties of the device models, as QEMU 7.2 has them: names, types, defaults; the explanations are ours.

Groups that several models share come first. What has no meaning for a disk without a guest's driver (queues, interrupts, ROMs) is
accepted with no effect.
"""

from __future__ import annotations

from typing import Final

from qblock.devices.properties import Property

SWITCH: Final = "on/off"
SWITCH_AUTO: Final = "on/off/auto"
POLICY: Final = "what becomes of a failed request: report/ignore/enospc/stop/auto"
BLOCK_SIZE: Final = "a power of two from 512 to 2 MiB"
FDC_TYPE: Final = "kind of drive: 144/288/120/none/auto"

PCI: Final = (
    Property("acpi-index", "uint32", 0),
    Property("addr", "int32", -1, "slot, or slot.function, in hexadecimal: 6 or 06.0"),
    Property("failover_pair_id", "str"),
    Property("multifunction", "bool", False, SWITCH),
    Property("rombar", "uint32", 1),
    Property("romfile", "str"),
    Property("romsize", "uint32", 4294967295),
    Property("x-pcie-extcap-init", "bool", True, SWITCH),
    Property("x-pcie-lnksta-dllla", "bool", True, SWITCH),
)
BLOCK: Final = (
    Property("account-failed", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("account-invalid", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("backend_defaults", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("discard_granularity", "size", 4294967295),
    Property("drive", "str", doc="the disk: the id of a drive, or the name of a node"),
    Property("logical_block_size", "size", 0, BLOCK_SIZE),
    Property("min_io_size", "size", 0),
    Property("opt_io_size", "size", 0),
    Property("physical_block_size", "size", 0, BLOCK_SIZE),
    Property("share-rw", "bool", False),
    Property("write-cache", "OnOffAuto", "auto", SWITCH_AUTO),
)
ERROR_ACTIONS: Final = (
    Property("rerror", "BlockdevOnError", "auto", POLICY),
    Property("werror", "BlockdevOnError", "auto", POLICY),
)
BOOT: Final = (Property("bootindex", "int32"),)
PHYSICAL_GEOMETRY: Final = (
    Property("cyls", "uint32", 0),
    Property("heads", "uint32", 0),
    Property("secs", "uint32", 0),
)
LOGICAL_GEOMETRY: Final = (
    Property("lcyls", "uint32", 0),
    Property("lheads", "uint32", 0),
    Property("lsecs", "uint32", 0),
)
USB: Final = (
    Property("attached", "bool"),
    Property("msos-desc", "bool", True, SWITCH),
    Property("pcap", "str"),
    Property("port", "str"),
    Property("serial", "str"),
)
VIRTIO_PCI: Final = (
    Property("aer", "bool", False, SWITCH),
    Property("any_layout", "bool", True, SWITCH),
    Property("ats", "bool", False, SWITCH),
    Property("disable-legacy", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("disable-modern", "bool", False),
    Property("event_idx", "bool", True, SWITCH),
    Property("indirect_desc", "bool", True, SWITCH),
    Property("ioeventfd", "bool", True, SWITCH),
    Property("iommu_platform", "bool", False, SWITCH),
    Property("iothread", "link<iothread>"),
    Property("migrate-extra", "bool", True, SWITCH),
    Property("modern-pio-notify", "bool", False, SWITCH),
    Property("notify_on_empty", "bool", True, SWITCH),
    Property("packed", "bool", False, SWITCH),
    Property("page-per-vq", "bool", False, SWITCH),
    Property("queue_reset", "bool", True, SWITCH),
    Property("use-disabled-flag", "bool", True),
    Property("use-started", "bool", True),
    Property("vectors", "uint32", 4294967295),
    Property("virtio-pci-bus-master-bug-migration", "bool", False, SWITCH),
    Property("x-ats-page-aligned", "bool", True, SWITCH),
    Property("x-disable-legacy-check", "bool", False),
    Property("x-disable-pcie", "bool", False, SWITCH),
    Property("x-ignore-backend-features", "bool", False),
    Property("x-pcie-deverr-init", "bool", True, SWITCH),
    Property("x-pcie-flr-init", "bool", True, SWITCH),
    Property("x-pcie-lnkctl-init", "bool", True, SWITCH),
    Property("x-pcie-pm-init", "bool", True, SWITCH),
)
SCSI: Final = (
    Property("channel", "uint32", 0),
    Property("device_id", "str"),
    Property("lun", "uint32", 4294967295),
    Property("max_io_size", "uint64", 2147483647),
    Property("port_index", "uint16", 0),
    Property("port_wwn", "uint64", 0),
    Property("product", "str"),
    Property("quirk_mode_page_vendor_specific_apple", "bool", False, SWITCH),
    Property("scsi-id", "uint32", 4294967295),
    Property("scsi_version", "int32", 5),
    Property("serial", "str"),
    Property("vendor", "str"),
    Property("ver", "str"),
    Property("wwn", "uint64", 0),
)
IDE: Final = (
    Property("model", "str"),
    Property("serial", "str"),
    Property("unit", "uint32", 4294967295),
    Property("ver", "str"),
    Property("wwn", "uint64", 0),
)
XHCI: Final = (
    Property("host", "link<device>"),
    Property("p2", "uint32", 4),
    Property("p3", "uint32", 4),
    Property("streams", "bool", True, SWITCH),
    Property("xhci-core", "child<base-xhci>"),
)
VIRTIO_BLK_PCI: Final = (
    *PCI,
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *PHYSICAL_GEOMETRY,
    *LOGICAL_GEOMETRY,
    *VIRTIO_PCI,
    Property("class", "uint32", 0),
    Property("config-wce", "bool", True, SWITCH),
    Property("discard", "bool", True, SWITCH),
    Property("max-discard-sectors", "uint32", 4194303),
    Property("max-write-zeroes-sectors", "uint32", 4194303),
    Property("num-queues", "uint16", 65535),
    Property("queue-size", "uint16", 256),
    Property("report-discard-granularity", "bool", True),
    Property("request-merging", "bool", True, SWITCH),
    Property("scsi", "bool", False, SWITCH),
    Property("seg-max-adjust", "bool", True),
    Property("serial", "str"),
    Property("virtio-backend", "child<virtio-blk-device>"),
    Property("write-zeroes", "bool", True, SWITCH),
    Property("x-enable-wce-if-config-wce", "bool", True),
)
SCSI_HD: Final = (
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *PHYSICAL_GEOMETRY,
    *LOGICAL_GEOMETRY,
    *SCSI,
    Property("dpofua", "bool", False, SWITCH),
    Property("max_unmap_size", "uint64", 1073741824),
    Property("removable", "bool", False, SWITCH),
    Property("rotation_rate", "uint16", 0),
)
SCSI_CD: Final = (
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *SCSI,
    Property("quirk_mode_page_apple_vendor", "bool", False, SWITCH),
    Property("quirk_mode_page_truncated", "bool", False, SWITCH),
    Property("quirk_mode_sense_rom_use_dbd", "bool", False, SWITCH),
)
IDE_HD: Final = (
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *PHYSICAL_GEOMETRY,
    *LOGICAL_GEOMETRY,
    *IDE,
    Property(
        "bios-chs-trans",
        "BiosAtaTranslation",
        "auto",
        "how cylinders, heads and sectors are counted: auto/none/lba/large/rechs",
    ),
    Property("rotation_rate", "uint16", 0),
)
IDE_CD: Final = (
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *IDE,
)
FLOPPY: Final = (
    *BLOCK,
    Property("drive-type", "FdcDriveType", "auto", FDC_TYPE),
    Property("unit", "uint32", 4294967295),
)
NVME: Final = (
    *PCI,
    *BLOCK,
    *BOOT,
    Property("aer_max_queued", "uint32", 64),
    Property("aerl", "uint8", 3),
    Property("cmb_size_mb", "uint32", 0),
    Property("ioeventfd", "bool", False),
    Property("max_ioqpairs", "uint32", 64),
    Property("mdts", "uint8", 7),
    Property("msix-exclusive-bar", "bool", False),
    Property("msix_qsize", "uint16", 65),
    Property("num_queues", "uint32", 0),
    Property("pmrdev", "link<memory-backend>"),
    Property("serial", "str"),
    Property("smart_critical_warning", "uint8"),
    Property("sriov_max_vfs", "uint8", 0),
    Property("sriov_max_vi_per_vf", "uint8", 0),
    Property("sriov_max_vq_per_vf", "uint8", 0),
    Property("sriov_vi_flexible", "uint16", 0),
    Property("sriov_vq_flexible", "uint16", 0),
    Property("subsys", "link<nvme-subsys>"),
    Property("use-intel-id", "bool", False),
    Property("vsl", "uint8", 7),
    Property("zoned.auto_transition", "bool", True),
    Property("zoned.zasl", "uint8", 0),
)
NVME_NS: Final = (
    *BLOCK,
    *BOOT,
    Property("detached", "bool", False),
    Property("eui64-default", "bool", False),
    Property("eui64", "uint64", 0),
    Property("mcl", "uint32", 128),
    Property("ms", "uint16", 0),
    Property("mset", "uint8", 0),
    Property("msrc", "uint8", 127),
    Property("mssrl", "uint16", 128),
    Property("nsid", "uint32", 0),
    Property("pi", "uint8", 0),
    Property("pif", "uint8", 0),
    Property("pil", "uint8", 0),
    Property("shared", "bool", True),
    Property("uuid", "str", doc="a UUID; auto for a random one"),
    Property("zoned.cross_read", "bool", False),
    Property("zoned.descr_ext_size", "uint32", 0),
    Property("zoned.max_active", "uint32", 0),
    Property("zoned.max_open", "uint32", 0),
    Property("zoned.numzrwa", "uint32", 0),
    Property("zoned.zone_capacity", "size", 0),
    Property("zoned.zone_size", "size", 134217728),
    Property("zoned.zrwafg", "size", 18446744073709551615),
    Property("zoned.zrwas", "size", 0),
    Property("zoned", "bool", False),
)
NVME_SUBSYS: Final = (Property("nqn", "str"),)
USB_STORAGE: Final = (
    *BLOCK,
    *ERROR_ACTIONS,
    *BOOT,
    *USB,
    Property("commandlog", "bool", False),
    Property("removable", "bool", False),
)
VIRTIO_SCSI_PCI: Final = (
    *PCI,
    *VIRTIO_PCI,
    Property("cmd_per_lun", "uint32", 128),
    Property("hotplug", "bool", True, SWITCH),
    Property("max_sectors", "uint32", 65535),
    Property("num_queues", "uint32", 4294967295),
    Property("param_change", "bool", True, SWITCH),
    Property("seg_max_adjust", "bool", True),
    Property("virtio-backend", "child<virtio-scsi-device>"),
    Property("virtqueue_size", "uint32", 256),
)
MEGASAS: Final = (
    *PCI,
    Property("hba_serial", "str"),
    Property("max_cmds", "uint32", 1000),
    Property("max_sge", "uint32", 80),
    Property("msi", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("msix", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("sas_address", "uint64", 0),
    Property("use_jbod", "bool", False, SWITCH),
)
MEGASAS_GEN2: Final = (
    *PCI,
    Property("hba_serial", "str"),
    Property("max_cmds", "uint32", 1008),
    Property("max_sge", "uint32", 80),
    Property("msi", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("msix", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("sas_address", "uint64", 0),
    Property("use_jbod", "bool", False, SWITCH),
)
MPTSAS1068: Final = (
    *PCI,
    Property("msi", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("sas_address", "uint64", 0),
)
AM53C974: Final = (
    *PCI,
    Property("esp", "child<esp>"),
)
PVSCSI: Final = (
    *PCI,
    Property("use_msg", "uint8", 1),
    Property("x-disable-pcie", "bool", False, SWITCH),
    Property("x-old-pci-configuration", "bool", False, SWITCH),
)
ICH9_AHCI: Final = (
    *PCI,
    Property("ahci-idp[0]", "child<memory-region>"),
    Property("ahci[0]", "child<memory-region>"),
)
ISA_FDC: Final = (
    Property("bootindexA", "int32"),
    Property("bootindexB", "int32"),
    Property("dma", "uint32", 2),
    Property("fallback", "FdcDriveType", "288", FDC_TYPE),
    Property("fdtypeA", "FdcDriveType", "auto", FDC_TYPE),
    Property("fdtypeB", "FdcDriveType", "auto", FDC_TYPE),
    Property("iobase", "uint32", 1008),
    Property("irq", "uint32", 6),
)
QEMU_XHCI: Final = (
    *PCI,
    *XHCI,
)
NEC_USB_XHCI: Final = (
    *PCI,
    *XHCI,
    Property("force-pcie-endcap", "bool", False, SWITCH),
    Property("intrs", "uint32", 16),
    Property("msi", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("msix", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("slots", "uint32", 64),
    Property("superspeed-ports-first", "bool", True, SWITCH),
)
USB_EHCI: Final = (
    *PCI,
    Property("capabilities[0]", "child<memory-region>"),
    Property("ehci[0]", "child<memory-region>"),
    Property("maxframes", "uint32", 128),
    Property("operational[0]", "child<memory-region>"),
    Property("ports[0]", "child<memory-region>"),
)
ICH9_USB_EHCI1: Final = (
    *PCI,
    Property("capabilities[0]", "child<memory-region>"),
    Property("ehci[0]", "child<memory-region>"),
    Property("maxframes", "uint32", 128),
    Property("operational[0]", "child<memory-region>"),
    Property("ports[0]", "child<memory-region>"),
)
ICH9_USB_UHCI1: Final = (
    *PCI,
    Property("bandwidth", "uint32", 1280),
    Property("firstport", "uint32", 0),
    Property("masterbus", "str"),
    Property("maxframes", "uint32", 128),
)
PIIX3_USB_UHCI: Final = (
    *PCI,
    Property("bandwidth", "uint32", 1280),
    Property("maxframes", "uint32", 128),
)
PCI_OHCI: Final = (
    *PCI,
    Property("firstport", "uint32", 0),
    Property("masterbus", "str"),
    Property("num-ports", "uint32", 3),
)
USB_UAS: Final = (
    *USB,
    Property("log-scsi-req", "uint32", 0),
)
USB_HUB: Final = (
    *USB,
    Property("port-power", "bool", False),
    Property("ports", "uint32", 8),
)
PCIE_ROOT_PORT: Final = (
    *PCI,
    Property("aer_log_max", "uint16", 8),
    Property("bus-reserve", "uint32", 4294967295),
    Property("chassis", "uint8", 0),
    Property("disable-acs", "bool", False),
    Property("hotplug", "bool", True),
    Property("io-reserve", "size", 18446744073709551615),
    Property("mem-reserve", "size", 18446744073709551615),
    Property("port", "uint8", 0),
    Property("power_controller_present", "bool", True, SWITCH),
    Property("pref32-reserve", "size", 18446744073709551615),
    Property("pref64-reserve", "size", 18446744073709551615),
    Property("slot", "uint16", 0),
    Property("x-migrate-msix", "bool", True),
    Property("x-native-hotplug", "bool", True),
    Property("x-speed", "PCIELinkSpeed", "16", "2_5/5/8/16"),
    Property("x-width", "PCIELinkWidth", "32", "1/2/4/8/12/16/32"),
)
PCI_BRIDGE: Final = (
    *PCI,
    Property("bus-reserve", "uint32", 4294967295),
    Property("chassis_nr", "uint8", 0),
    Property("io-reserve", "size", 18446744073709551615),
    Property("mem-reserve", "size", 18446744073709551615),
    Property("msi", "OnOffAuto", "auto", SWITCH_AUTO),
    Property("pref32-reserve", "size", 18446744073709551615),
    Property("pref64-reserve", "size", 18446744073709551615),
    Property("shpc", "bool", True, SWITCH),
)
