"""qemu-img convert beside qblock-img convert: between raw and qcow2, and a three-layer chain to one image.

python benchmarks/convert.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

from harness import BULK, MiB, Table, main, qemu
from images import chain, fill, fill_with_text


def compare_all(table: Table) -> None:
    """Make the sources, compare."""
    folder, target = table.folder, table.folder / "target"
    (folder / "convert").mkdir()
    raw, flat, text = (folder / "convert" / name for name in ("raw", "flat", "text"))
    fill(raw, table.size * MiB)
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, flat)
    top = chain(folder / "convert", table.size * MiB)
    for title, source, source_format, target_format in (
        ("raw to qcow2", raw, "raw", "qcow2"),
        ("qcow2 to raw", flat, "qcow2", "raw"),
        ("qcow2 to qcow2", flat, "qcow2", "qcow2"),
        ("chain of three to qcow2", top, "qcow2", "qcow2"),
    ):
        words = ["convert", "-f", source_format, "-O", target_format, source, target]
        table.compare_tool(f"convert {title}", words, required=BULK, before=lambda: target.unlink(missing_ok=True))
    fill_with_text(text, table.size * MiB // 2)
    for kind in ("zlib", "zstd"):
        words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", text, target]
        table.compare_tool(f"convert -c, {kind}", words, required=BULK, before=lambda: target.unlink(missing_ok=True))
        if table.wants(f"convert packed {kind}"):
            target.unlink(missing_ok=True)
            qemu(*words[:-1], folder / "packed")
            words = ["convert", "-f", "qcow2", "-O", "raw", folder / "packed", target]
            table.compare_tool(
                f"convert packed {kind} to raw", words, required=BULK, before=lambda: target.unlink(missing_ok=True)
            )
    target.unlink(missing_ok=True)


if __name__ == "__main__":
    main(__doc__, compare_all)
