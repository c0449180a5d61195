"""``qblock-img check``: verify, and repair where the driver can, the metadata of an image.

Exit codes of qemu-img 7.2: 0 nothing wrong (or repaired), 1 the check itself failed, 2 corruptions, 3 only leaked clusters,
63 the format has no check.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any, Final

import attrs

from qblock.driver import CheckFix, CheckResult, SupportsCheck
from qblock.errors import CommandError
from qblock.imageinfo import in_order
from qblock.tools.arguments import Arguments, UsageError, cache_options
from qblock.tools.console import complain
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets

EXIT_OK, EXIT_FAILED, EXIT_CORRUPT, EXIT_LEAKS, EXIT_NO_CHECK = 0, 1, 2, 3, 63
FIXES: Final = {"leaks": CheckFix.LEAKS, "all": CheckFix.LEAKS | CheckFix.ERRORS}
ORDER: Final = (
    "image-end-offset", "compressed-clusters", "total-clusters", "corruptions", "corruptions-fixed", "check-errors", "leaks",
    "leaks-fixed", "allocated-clusters", "filename", "format", "fragmented-clusters",
)  # fmt: skip


class _NoCheck(CommandError):
    """The image's format has no check."""


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:qr:T:U", {"output=": "output", "repair=": "r", "image-opts": "image-opts", "force-share": "U",
                           "object=": "object", "format=": "f"}
    )  # fmt: skip
    output = arguments.output_format()
    repair = arguments.get("r")
    if repair is not None and repair not in FIXES:
        raise UsageError(f"-r takes 'leaks' or 'all', not '{repair}'")
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    watch = with_secrets(arguments, watch)
    fix = FIXES[repair] if repair else CheckFix.NONE
    wanted = ImageArguments(
        arguments.words[0],
        fmt=arguments.get("f"),
        image_opts="image-opts" in arguments,
        writable=fix is not CheckFix.NONE,
        force_share="U" in arguments,
        to_check=True,
        extra=cache_options(arguments.get("T")),
    )
    try:
        name, result = run_session(lambda session: _check(session, wanted, fix), watch)
    except _NoCheck as error:
        complain("qblock-img", str(error))
        return EXIT_NO_CHECK
    for finding in result.findings:
        print(finding, file=sys.stderr)
    if output == "json":
        _print_json(result, wanted.name, name)
    elif "q" not in arguments:
        print("\n".join(_human_lines(result)))
    return _exit_code(result)


async def _check(session: ImageSession, wanted: ImageArguments, fix: CheckFix) -> tuple[str, CheckResult]:
    backend = await session.open(wanted)
    node = backend.node
    driver = node.driver
    if not isinstance(driver, SupportsCheck):
        raise _NoCheck(f"images of the format '{driver.name}' cannot be checked")
    result = await driver.check(fix)
    if result.corruptions_fixed or result.leaks_fixed:
        verified = await driver.check(CheckFix.NONE)
        result = attrs.evolve(
            verified,
            corruptions_fixed=result.corruptions_fixed,
            leaks_fixed=result.leaks_fixed,
            findings=(*result.findings, *verified.findings),
        )
    return driver.name, result


def _exit_code(result: CheckResult) -> int:
    if result.corruptions:
        return EXIT_CORRUPT
    if result.leaks:
        return EXIT_LEAKS
    return EXIT_FAILED if result.check_errors else EXIT_OK


def _print_json(result: CheckResult, filename: str, fmt: str) -> None:
    counts = {
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    report: dict[str, Any] = {key: count for key, count in counts.items() if count}
    report |= {"filename": filename, "format": fmt, "check-errors": result.check_errors}
    ranks = {key: rank for rank, key in enumerate(ORDER)}
    print(json.dumps(in_order(report, ranks), indent=4, ensure_ascii=False))


def _human_lines(result: CheckResult) -> Iterable[str]:
    if result.corruptions_fixed or result.leaks_fixed:
        yield "The following inconsistencies were found and repaired:"
        yield ""
        yield f"    {result.leaks_fixed} leaked clusters"
        yield f"    {result.corruptions_fixed} corruptions"
        yield ""
        yield "Double checking the fixed image now..."
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"\n{result.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield f"\n{result.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        allocated, total = result.allocated_clusters, result.total_clusters
        fragmented, compressed = result.fragmented_clusters or 0, result.compressed_clusters or 0
        yield (
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{fragmented * 100 / allocated:.2f}% fragmented, {compressed * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"
