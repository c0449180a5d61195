"""Shared by all tests: who is skipped where QEMU is missing, and how Hypothesis behaves in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

QEMU_PROGRAMS = ("qemu-img", "qemu-io", "qemu-storage-daemon")
COMPAT = Path(__file__).parent / "compat"

settings.register_profile(
    "default", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("long", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/compat, and what is marked `qemu`, needs the real programs."""
    missing = [program for program in QEMU_PROGRAMS if shutil.which(program) is None]
    skip = pytest.mark.skip(reason=f"needs the real QEMU: {', '.join(missing)} not installed")
    for item in items:
        if COMPAT in item.path.parents:
            item.add_marker(pytest.mark.qemu)
        if missing and item.get_closest_marker("qemu"):
            item.add_marker(skip)
