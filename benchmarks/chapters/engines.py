"""The chapter about the engines of an export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.chapters.telling import spread_of

# What the fastest half-precision engine of a large teacher is to reach: times the first row, and share of the peak.
AIM_RATIO, AIM_SHARE, AIM_CHEAPER = 4.0, 0.75, 10.0


def chapter(record: dict[str, Any]) -> str:
    """A table a model: every runtime and precision against the eager model, one crop at a time."""
    lines = [
        "`of the peak` is the encoder's arithmetic against the machine's product of matrices in its precision, measured "
        "in the same run; fast convolutions do with less and may pass it.\n"
    ]
    if "note" in record:
        lines.append(f"{record['note']}\n")
    for name, model in record["rows"].items():
        per_image = model["views_per_image"]
        lines += [
            f"**{name}** ({model['kind']}; {model['gflop_per_view']:.2f} GFLOP a view, {per_image} an image)\n",
            "| | views/s | ratio | spread | images/s | really | of the peak | peak memory | largest difference | "
            "cosine | equal labels |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(row, found, per_image) for row, found in model["rows"].items()]
        lines.append("")
        ahead = model.get("verdicts", {})
        if ahead:
            told = "; ".join(f"{engine}: {found['verdict']}" for engine, found in ahead.items())
            lines.append(f"Built ahead for a GPU that is not here: {told}.\n")
    return "\n".join([*lines, " ".join(_reading(record["rows"]))])


def _row(name: str, found: dict[str, Any], views_per_image: int) -> str:
    rate, ratio, parity = found["views_per_s"], found["ratio_to_first"], found.get("parity")
    agreement = (
        f"{parity['largest']:.2g} | {parity['cosine']:.5f} | {parity['agreement']:.2%}" if parity else " | | "
    )
    return (
        f"| {name} | {rate['median']:.1f} | **{ratio['median']:.1f}** | {spread_of(ratio, '{:.1f}'.format)} | "
        f"{rate['median'] / views_per_image:.1f} | {found['precision_read']} | {found['share_of_peak']:.0%} | "
        f"{found['peak_mb']['median']:.0f} MB | {agreement} |"
    )


def _reading(models: dict[str, Any]) -> Iterator[str]:
    for name, model in models.items():
        fastest = max(model["rows"], key=lambda row: model["rows"][row]["ratio_to_first"]["median"])
        ratio = model["rows"][fastest]["ratio_to_first"]["median"]
        yield f"{name}: {fastest} is the fastest, {ratio:.1f} times the first row."
    half = models.get("ViT-B-32", {}).get("rows", {}).get("openvino-bf16")
    if half:
        ratio, share = half["ratio_to_first"]["median"], half["share_of_peak"]
        yield (
            f"ViT-B-32 in bf16 reaches {ratio:.1f} times (aim {AIM_RATIO:g}) and {share:.0%} of the peak "
            f"(aim {AIM_SHARE:.0%})."
        )
    if "student" in models and "ViT-B-32" in models:
        cheaper = _images_per_s(models["student"]) / _images_per_s(models["ViT-B-32"])
        yield (
            f"The fastest student scores {cheaper:.0f} images in the time of one of the teacher (aim {AIM_CHEAPER:g})."
        )


def _images_per_s(model: dict[str, Any]) -> float:
    best = max(row["views_per_s"]["median"] for row in model["rows"].values())
    return float(best / model["views_per_image"])
