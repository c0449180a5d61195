"""Devices that have nothing to do with disks: management software asks for them, and they are there, without any effect.

By category and bus as ``-device help`` of qemu-system-x86_64 7.2 has them. Whatever properties they are given are taken.
"""

from __future__ import annotations

from typing import Final

INERT: Final[tuple[tuple[str, str | None, tuple[tuple[str, str, str], ...]], ...]] = (
    # category, bus, and models: name, alias, description
    ("Controller/Bridge/Hub", "PCI", (
        ("i82801b11-bridge", "", ""),
        ("ioh3420", "", "Intel IOH device id 3420 PCIE Root Port"),
        ("pci-bridge-seat", "", "Standard PCI Bridge (multiseat)"),
        ("pcie-pci-bridge", "", ""),
        ("pxb", "", "PCI Expander Bridge"),
        ("pxb-pcie", "", "PCI Express Expander Bridge"),
        ("x3130-upstream", "", "TI X3130 Upstream Port of PCI Express Switch"),
        ("xio3130-downstream", "", "TI X3130 Downstream Port of PCI Express Switch"),
    )),
    ("Network", "PCI", (
        ("e1000", "e1000-82540em", "Intel Gigabit Ethernet"),
        ("e1000-82544gc", "", "Intel Gigabit Ethernet"),
        ("e1000-82545em", "", "Intel Gigabit Ethernet"),
        ("e1000e", "", "Intel 82574L GbE Controller"),
        ("i82550", "", "Intel i82550 Ethernet"),
        ("i82551", "", "Intel i82551 Ethernet"),
        ("i82557a", "", "Intel i82557A Ethernet"),
        ("i82557b", "", "Intel i82557B Ethernet"),
        ("i82557c", "", "Intel i82557C Ethernet"),
        ("i82558a", "", "Intel i82558A Ethernet"),
        ("i82558b", "", "Intel i82558B Ethernet"),
        ("i82559a", "", "Intel i82559A Ethernet"),
        ("i82559b", "", "Intel i82559B Ethernet"),
        ("i82559c", "", "Intel i82559C Ethernet"),
        ("i82559er", "", "Intel i82559ER Ethernet"),
        ("i82562", "", "Intel i82562 Ethernet"),
        ("i82801", "", "Intel i82801 Ethernet"),
        ("ne2k_pci", "", ""),
        ("pcnet", "", ""),
        ("rtl8139", "", ""),
        ("tulip", "", ""),
        ("virtio-net-pci", "virtio-net", ""),
        ("virtio-net-pci-non-transitional", "", ""),
        ("virtio-net-pci-transitional", "", ""),
        ("vmxnet3", "", "VMWare Paravirtualized Ethernet v3"),
    )),
    ("Network", "ISA", (
        ("ne2k_isa", "", ""),
    )),
    ("Network", "usb-bus", (
        ("usb-net", "", ""),
    )),
    ("Input", "ISA", (
        ("i8042", "", ""),
        ("isa-parallel", "", ""),
        ("isa-serial", "", ""),
        ("vmmouse", "", ""),
    )),
    ("Input", "PCI", (
        ("pci-serial", "", ""),
        ("pci-serial-2x", "", ""),
        ("pci-serial-4x", "", ""),
        ("virtio-input-host-pci", "virtio-input-host", ""),
        ("virtio-keyboard-pci", "virtio-keyboard", ""),
        ("virtio-mouse-pci", "virtio-mouse", ""),
        ("virtio-serial-pci", "virtio-serial", ""),
        ("virtio-serial-pci-non-transitional", "", ""),
        ("virtio-serial-pci-transitional", "", ""),
        ("virtio-tablet-pci", "virtio-tablet", ""),
    )),
    ("Input", "usb-bus", (
        ("usb-braille", "", ""),
        ("usb-kbd", "", ""),
        ("usb-mouse", "", ""),
        ("usb-serial", "", ""),
        ("usb-tablet", "", ""),
        ("usb-wacom-tablet", "", "QEMU PenPartner Tablet"),
    )),
    ("Input", "virtio-serial-bus", (
        ("virtconsole", "", ""),
        ("virtserialport", "", ""),
    )),
    ("Display", "PCI", (
        ("ati-vga", "", ""),
        ("bochs-display", "", ""),
        ("cirrus-vga", "", "Cirrus CLGD 54xx VGA"),
        ("qxl", "", "Spice QXL GPU (secondary)"),
        ("qxl-vga", "", "Spice QXL GPU (primary, vga compatible)"),
        ("secondary-vga", "", ""),
        ("VGA", "", ""),
        ("virtio-gpu-gl-pci", "virtio-gpu-gl", ""),
        ("virtio-gpu-pci", "virtio-gpu", ""),
        ("virtio-vga", "", ""),
        ("virtio-vga-gl", "", ""),
        ("vmware-svga", "", ""),
    )),
    ("Display", "ISA", (
        ("isa-cirrus-vga", "", ""),
        ("isa-vga", "", ""),
        ("sga", "", "Serial Graphics Adapter"),
    )),
    ("Display", "System", (
        ("ramfb", "", "ram framebuffer standalone device"),
    )),
    ("Sound", "PCI", (
        ("AC97", "ac97", "Intel 82801AA AC97 Audio"),
        ("ES1370", "es1370", "ENSONIQ AudioPCI ES1370"),
        ("ich9-intel-hda", "", "Intel HD Audio Controller (ich9)"),
        ("intel-hda", "", "Intel HD Audio Controller (ich6)"),
    )),
    ("Sound", "ISA", (
        ("adlib", "", "Yamaha YM3812 (OPL2)"),
        ("cs4231a", "", "Crystal Semiconductor CS4231A"),
        ("gus", "", "Gravis Ultrasound GF1"),
        ("sb16", "", "Creative Sound Blaster 16"),
    )),
    ("Sound", "HDA", (
        ("hda-duplex", "", "HDA Audio Codec, duplex (line-out, line-in)"),
        ("hda-micro", "", "HDA Audio Codec, duplex (speaker, microphone)"),
        ("hda-output", "", "HDA Audio Codec, output-only (line-out)"),
    )),
    ("Sound", "usb-bus", (
        ("usb-audio", "", ""),
    )),
    ("Misc", "PCI", (
        ("acpi-erst", "", "ACPI Error Record Serialization Table (ERST) device"),
        ("AMDVI-PCI", "", "AMD IOMMU (AMD-Vi) DMA Remapping device"),
        ("ctucan_pci", "", "CTU CAN PCI"),
        ("kvaser_pci", "", "Kvaser PCICANx"),
        ("mioe3680_pci", "", "Mioe3680 PCICANx"),
        ("pcm3680_pci", "", "Pcm3680i PCICANx"),
        ("pvpanic-pci", "", ""),
        ("virtio-balloon-pci", "virtio-balloon", ""),
        ("virtio-balloon-pci-non-transitional", "", ""),
        ("virtio-balloon-pci-transitional", "", ""),
        ("virtio-crypto-pci", "", ""),
        ("virtio-iommu-pci", "virtio-iommu", ""),
        ("virtio-mem-pci", "", ""),
        ("virtio-pmem-pci", "", ""),
        ("virtio-rng-pci", "virtio-rng", ""),
        ("virtio-rng-pci-non-transitional", "", ""),
        ("virtio-rng-pci-transitional", "", ""),
    )),
    ("Misc", None, (
        ("guest-loader", "", "Guest Loader"),
        ("hv-syndbg", "", ""),
        ("vmcoreinfo", "", ""),
        ("vmgenid", "", ""),
    )),
    ("Misc", "ISA", (
        ("hyperv-testdev", "", ""),
        ("isa-applesmc", "", ""),
        ("isa-debug-exit", "", ""),
        ("isa-debugcon", "", ""),
        ("mc146818rtc", "", ""),
        ("pc-testdev", "", ""),
        ("pvpanic", "", ""),
    )),
    ("Misc", "System", (
        ("intel-iommu", "", "Intel IOMMU (VT-d) DMA Remapping device"),
    )),
    ("Watchdog", "PCI", (
        ("i6300esb", "", "Intel 6300ESB"),
    )),
    ("Watchdog", "ISA", (
        ("ib700", "", "iBASE 700"),
    )),
    ("Uncategorized", None, (
        ("pc-dimm", "", "DIMM memory module"),
    )),
    ("Uncategorized", "PCI", (
        ("x-pci-proxy-dev", "", ""),
    )),
)  # fmt: skip
