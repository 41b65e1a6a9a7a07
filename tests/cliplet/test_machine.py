"""What is read of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplet import machine


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, [1.5]),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, [4.0]),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, []),
        ({"memory.max": "1073741824\n"}, [2.0**30]),
        ({}, []),
    ],
)
def test_limits_of_a_control_group(files: dict[str, str], limit: list[float], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert list(machine._limit(tmp_path / next(iter(files), "cpu.max"))) == limit


def test_peak_memory_grows_with_what_is_used() -> None:
    before = machine.peak_memory_bytes()
    assert before is not None
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    after = machine.peak_memory_bytes()
    assert after is not None and after >= len(block)


def test_a_quota_lowers_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    assert machine.usable_cores() == 1
