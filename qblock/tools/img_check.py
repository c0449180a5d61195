"""``qblock-img check``: verify, and repair where the driver can, the metadata of an image.

Exit codes of qemu-img 7.2: 0 nothing wrong (or repaired), 1 the check or repair itself failed, 2 corruptions, 3 only leaked
clusters, 63 the format has no check. Of ours is ``--explain``: what each finding is, where it lies, which part of the disk it
concerns, and what repair does about it; with ``--output=json`` as the member ``findings``.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, Final

import attrs

from qblock.driver import CheckFix, CheckResult, Progress, SupportsCheck, no_progress
from qblock.errors import CommandError
from qblock.findings import Finding
from qblock.imageinfo import in_order
from qblock.ranges import ByteRange
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.console import Style, complain
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets

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
                           "object=": "object", "format=": "f", "explain": "explain"}
    )  # fmt: skip
    output = arguments.output_format()
    repair = arguments.get("r")
    if repair is not None and repair not in FIXES:
        raise UsageError(f"-r takes 'leaks' or 'all', not '{repair}'")
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    arguments.check_image_opts()
    watch = with_secrets(arguments, watch)
    fix = FIXES[repair] if repair else CheckFix.NONE
    explain = "explain" in arguments
    flags = cache_flags(arguments.get("T"))
    wanted = ImageArguments.of(
        arguments,
        arguments.words[0],
        writable=fix is not CheckFix.NONE,
        to_check=True,
        resizable=flags.cache_direct,  # a raw image that ends within a block grows when its last one is written
        flags=flags,
    )
    try:
        name, result = run_session(lambda session: check_image(session, wanted, fix, explain=explain), watch)
    except _NoCheck as error:
        complain("qblock-img", str(error))
        return EXIT_NO_CHECK
    if not explain:
        for finding in result.findings:
            print(finding, file=sys.stderr)
    if output == "json":
        if "q" not in arguments and (not result.refused or explain):
            _print_json(result, wanted.name, name, explain=explain)
    elif "q" not in arguments:
        if explain:
            print("\n".join(explained(result.details)))
        if not result.refused:
            print("\n".join(_human_lines(result, Style.of_terminal())))
    if result.refused:
        complain("qblock-img", f"Nothing was repaired: {result.refused}")
        return EXIT_FAILED
    return _exit_code(result)


async def check_image(
    session: ImageSession, wanted: ImageArguments, fix: CheckFix, *, explain: bool, progress: Progress = no_progress
) -> tuple[str, CheckResult]:
    """The format of an image and what its check has found, after the repair if there was one. Raises `QBlockError`."""
    backend = await session.open(wanted)
    node = backend.node
    driver = node.driver
    if not isinstance(driver, SupportsCheck):
        raise _NoCheck(f"images of the format '{driver.name}' cannot be checked")
    result = await driver.check(fix, explain=explain, progress=progress)
    if result.refused:
        return driver.name, result
    if result.corruptions_fixed or result.leaks_fixed:
        verified = await driver.check(CheckFix.NONE, explain=explain)
        result = attrs.evolve(
            verified,
            corruptions_fixed=result.corruptions_fixed,
            leaks_fixed=result.leaks_fixed,
            findings=(*result.findings, *verified.findings),
            details=(*(one for one in result.details if one.fixed), *verified.details),
        )
    return driver.name, result


def _exit_code(result: CheckResult) -> int:
    if result.check_errors:
        return EXIT_FAILED
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else EXIT_OK


def _print_json(result: CheckResult, filename: str, fmt: str, *, explain: bool) -> None:
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
    if explain:
        report["findings"] = [_finding(one) for one in result.details]
    ranks = {key: rank for rank, key in enumerate(ORDER)}
    print(json.dumps(in_order(report, ranks), indent=4, ensure_ascii=False))


def _finding(one: Finding) -> dict[str, Any]:
    report: dict[str, Any] = {
        "kind": one.kind,
        "severity": one.severity.value,
        "what": one.text,
        "meaning": one.meaning,
    }
    if one.place is not None:
        report["place"] = _range(one.place)
    report |= {"guest": [_range(part) for part in one.guest], "users": list(one.users)}
    return report | {"repair": one.repair, "repaired": one.fixed}


def _range(part: ByteRange) -> dict[str, int]:
    return {"start": part.offset, "length": part.length}


def explained(findings: Iterable[Finding]) -> Iterable[str]:
    """What ``--explain`` prints for a person: a paragraph for each finding."""
    for number, one in enumerate(findings, 1):
        yield f"{number}. {one.severity.value}: {one.text}"
        if one.place is not None:
            yield f"   lies at:   {_shown(one.place)} of the file"
        if one.users:
            yield f"   used by:   {', '.join(dict.fromkeys(one.users))}"
        yield f"   concerns:  {', '.join(map(_shown, one.guest)) + ' of the disk' if one.guest else 'no part of the disk'}"
        yield from textwrap.wrap(one.meaning, 100, initial_indent="   means:     ", subsequent_indent=" " * 14)
        done = "This has been repaired." if one.fixed else one.repair
        yield from textwrap.wrap(done, 100, initial_indent="   repair:    ", subsequent_indent=" " * 14)
        yield ""


def _shown(part: ByteRange) -> str:
    return f"{part.offset:#x} to {part.end:#x} ({part.length} bytes)"


def _human_lines(result: CheckResult, style: Style) -> Iterable[str]:
    if result.corruptions_fixed or result.leaks_fixed:
        yield "The following inconsistencies were found and repaired:"
        yield ""
        yield f"    {result.leaks_fixed} leaked clusters"
        yield f"    {result.corruptions_fixed} corruptions"
        yield ""
        yield "Double checking the fixed image now..."
    if not (result.corruptions or result.leaks or result.check_errors):
        yield style.paint("No errors were found on the image.", "32")
    if result.corruptions:
        yield "\n" + style.paint(f"{result.corruptions} errors were found on the image.", "31")
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield "\n" + style.warning(f"{result.leaks} leaked clusters were found on the image.")
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
