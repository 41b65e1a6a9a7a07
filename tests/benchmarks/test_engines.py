"""The comparison of engines: what is compared, and what is said of engines that cannot run here."""

from __future__ import annotations

import pytest

from benchmarks import engines
from benchmarks.chapters.engines import chapter
from cliplet.artifact import Engine

PARITY = {"passed": True, "largest": 1e-5, "cosine": 1.0, "agreement": 1.0}


def engine(precision: str, **parity: object) -> Engine:
    details = {"read_from": "builder", "version": "1.7"}
    return Engine("tensorrt_rtx", precision, "a.plan", precision, "sm89", {**PARITY, **parity}, details)


@pytest.mark.parametrize("installed", [True, False])
def test_engines_for_a_gpu_are_built_where_their_library_is(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.setattr(engines, "find_spec", lambda _: object() if installed else None)
    found = engines.default_engines()
    assert set(engines.ENGINES) <= set(found) and ("onnx", "fp16") in found
    assert (("tensorrt_rtx", "fp16") in found) == installed


def test_what_cannot_run_here_has_a_verdict_and_no_time() -> None:
    built = engine("fp32", of="model.onnx")
    runs_here = engine("fp16")
    found = engines.verdicts([built, runs_here])
    assert found["tensorrt_rtx-fp32-sm89"]["verdict"] == "built, inspected, source agrees"
    assert found["tensorrt_rtx-fp16-sm89"] == {"verdict": "not built: not installed"}
    differs = engines.verdicts([engine("fp32", of="model.onnx", passed=False)])
    assert differs["tensorrt_rtx-fp32-sm89"]["verdict"] == "built, inspected, source differs"


def test_the_chapter_takes_a_record_with_verdicts() -> None:
    numbers = {"median": 1.0, "min": 1.0, "max": 1.0, "all": [1.0]}
    row = {
        "views_per_s": numbers,
        "ratio_to_first": numbers,
        "precision_read": "fp32",
        "share_of_peak": 0.5,
        "peak_mb": numbers,
        "parity": PARITY,
    }
    model = {"kind": "snippets", "gflop_per_view": 1.0, "views_per_image": 10, "rows": {"onnx-fp32": row}}
    model["verdicts"] = engines.verdicts([])
    assert "| onnx-fp32 | 1.0 |" in chapter({"rows": {"tiny": model}})
