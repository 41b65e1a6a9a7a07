"""The rows of a comparison, each a recipe: every method, parts of CCD taken away, its mends undone one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .classifier_recipe import METHODS, ClassifierRecipe
from .recipes import classifier_recipe, classifier_recipes, with_method

# Parts of CCD taken away or changed.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no part of CCD": {"label_update": False, "debias": False, "consistency": 0.0},
    "label update": {"debias": False, "consistency": 0.0},
    "label update + debias": {"consistency": 0.0},
    "label update + consistency": {"debias": False},
    "ccd, 3x3 snippets in the first labels": {"views": "1+3x3"},
    "ccd, two label updates": {"updates": 2},
    "ccd, unsure images weigh 0.1": {"unsure_weight": 0.1},
}
# Softmax scales other than the teacher's own. The public code's is 100, RN50x64's own; VOC 2012's labels are best at
# about a fifth of that. `tiny` learned 17.4: here are the public code's, and half its own.
SOFTMAX_SCALES = {"tiny": (100.0, 8.7)}
OTHER_SCALES = (20.0,)
# The mends undone, one at a time: fields that go back to what they are in the public code.
MENDS: dict[str, tuple[str, ...]] = {
    "ccd, ImageNet normalisation": ("teacher_normalisation",),
    "ccd, first-to-last-pixel corners": ("box_rule",),
    "ccd, stretched crops": ("crop_shape",),
    "ccd, walked threshold": ("threshold_search", "mean_classes"),
}
# More of them, which are trained only where --rows names them: they cost much, or change nothing on many data sets,
# or (the bias without its guard) fail on a data set that has no sure image of some class.
MENDS_ON_REQUEST: dict[str, tuple[str, ...]] = {
    "ccd, ImageNet normalisation one by one": ("teacher_normalisation", "scoring", "teacher_size"),
    "ccd, no guard of the bias": ("bias_guard",),
    "ccd, released floor": ("floor",),
    "ccd, released selection": ("selection", "held_out"),
    "ccd, released number of regions": ("max_regions",),
}


def compared_recipes(data: str) -> dict[str, ClassifierRecipe]:
    """The rows of the comparison on a data set: methods, ablations of CCD, the public code's CCD where known."""
    base = classifier_recipe(f"{data}_ccd")
    rows = {method: with_method(base, method) for method in METHODS}
    rows |= {name: replace(base, **changed) for name, changed in ABLATIONS.items()}
    for scale in SOFTMAX_SCALES.get(base.teacher, OTHER_SCALES):
        rows[f"ccd, softmax scale {scale:g}"] = replace(base, softmax_scale=scale)
    known = f"{data}_ccd_released" in classifier_recipes()
    released = classifier_recipe(f"{data}_ccd_released" if known else "voc12_ccd_released")
    for name, undone in (MENDS | MENDS_ON_REQUEST).items():
        rows[name] = replace(base, **{field: getattr(released, field) for field in undone})
    return rows | {"ccd_released": released} if known else rows
