"""The parity gate: the sizes it compares at, what it takes truth from, and what fills a batch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from cliplet.artifact import BundleJob
from cliplet.contract import CLASSIFIER, SNIPPETS
from cliplet.engine_sidecar import Profile
from cliplet.export.bundle import BuildOptions, open_gate
from cliplet.export.originals import load_original
from cliplet.export.parity import MOST_VIEWS, SHAPES, WHOLE_SHAPES, shapes_of, takes
from cliplet.export.samples import Samples, file_samples
from cliplet.images import decode_image
from cliplet.model_spec import parse_model_spec
from cliplet.views import Aggregation, Preprocessing, Views
from cliplet.vocabulary import NO_CLASSES, read_vocabulary

FED = Preprocessing(32, (0.5,) * 3, (0.2,) * 3)
CLASSES = read_vocabulary("cat,dog,bird")


def write_photos(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(80 + 30 * index, 120, index)).save(folder / f"{index}.jpg")
    return folder


def samples(folder: Path, count: int) -> Samples:
    files = sorted(write_photos(folder, count).iterdir())
    return Samples(tuple(decode_image(file.read_bytes(), fit=640) for file in files), "photos")


def test_without_tensorrt_the_usual_sizes_are_compared() -> None:
    assert shapes_of(SNIPPETS) == list(SHAPES)
    assert shapes_of(CLASSIFIER) == list(WHOLE_SHAPES)


@pytest.mark.parametrize(
    ("profile", "main", "others"),
    [
        (Profile(), (4, 10), [(8, 10), (32, 3)]),
        (Profile(batch=(8, 8, 8)), (8, 10), [(8, 12)]),
        (Profile(views=(4, 4, 4)), (4, 4), [(1, 4), (8, 4), (32, 4)]),
        (Profile(batch=(5, 6, 7), views=(2, 3, 3)), (5, 3), [(6, 3), (7, 3)]),
        (Profile(batch=(1, 16, 128)), (4, 10), [(16, 6), (128, 1)]),
    ],
)
def test_a_profiles_own_sizes_are_compared(
    profile: Profile, main: tuple[int, int], others: list[tuple[int, int]]
) -> None:
    found = shapes_of(SNIPPETS, profile)
    assert found[0] == main and set(others) <= set(found)
    assert set(SHAPES) <= set(found), "engines of other runtimes take every size"
    taken = [shape for shape in found if takes(profile, SNIPPETS, shape)]
    assert taken[0] == main and {batch for batch, _ in taken} >= set(profile.batch)
    for batch, views in set(taken) - set(SHAPES):
        assert batch * views <= MOST_VIEWS or views == profile.views[0]


def test_views_of_a_profile_mean_nothing_to_a_classifier() -> None:
    found = shapes_of(CLASSIFIER, Profile(batch=(1, 2, 3), views=(4, 4, 4)))
    assert found == [(3, 1), *WHOLE_SHAPES, (2, 1)]
    assert takes(Profile(views=(4, 4, 4)), CLASSIFIER, (1, 1))


def test_batches_are_filled_and_any_number_of_views_is_seen(tmp_path: Path) -> None:
    three = samples(tmp_path / "photos", 3)
    plain = list(three.batches(2, 8, FED, SNIPPETS))
    assert [feeds["boxes"].shape for feeds in plain] == [(2, 8, 4), (1, 8, 4)]
    filled = list(three.batches(2, 8, FED, SNIPPETS, filled=True))
    assert [feeds["boxes"].shape for feeds in filled] == [(2, 8, 4), (2, 8, 4)]
    (many,) = three.batches(7, 300, FED, SNIPPETS, filled=True)
    assert many["boxes"].shape == (7, 300, 4)
    np.testing.assert_array_equal(many["image"][0], many["image"][3])
    (single,) = three.batches(3, 1, FED, SNIPPETS)
    (whole,) = three.batches(3, Views(), FED, SNIPPETS)
    np.testing.assert_array_equal(single["boxes"], whole["boxes"])


def test_the_gate_runs_what_a_profile_allows(toy_clip: Path) -> None:
    """The sizes that were refused once: 8 images, 4 views, and neither of the usual ones."""
    spec = parse_model_spec(f"open_clip:local-dir:{toy_clip}")
    engines = (("onnx", "fp32"), ("tensorrt_rtx", "fp32"))
    job = BundleJob(spec, CLASSES, Aggregation(), {}, engines)
    profile = Profile(batch=(5, 6, 7), views=(2, 3, 3))
    original = load_original(job)
    gate = open_gate(original, job, BuildOptions(count=3, profile=profile))

    class Itself:
        """The original, in the place of an engine that notes what it is fed."""

        seen: list[tuple[int, ...]] = []

        def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.seen.append(feeds["boxes"].shape[:2])
            return next(
                outputs
                for reference in gate._references
                for known, outputs in zip(reference.feeds, reference.outputs, strict=True)
                if known is feeds
            )

    engine = Itself()
    found = gate.compare(engine, profile)
    assert found.shapes == ["5 x 3 views", "6 x 3 views", "7 x 3 views"]
    assert set(engine.seen) == {(5, 3), (6, 3), (7, 3)}
    assert (found.images, found.largest, found.agreement) == (3, 0.0, 1.0)
    assert len(list(gate.differences(engine))) == 3
    everywhere = gate.compare(engine).shapes
    assert {"1 x 1", "1 x 1+2x2+3x3+4x4"} <= set(everywhere)


LABELS = "file,classes\n0.jpg,cat;dog\n1.jpg,\n2.jpg,bird\n"


@pytest.mark.parametrize("source", ["", "*.jpg"])
def test_truth_comes_from_the_labels_beside_images(tmp_path: Path, source: str) -> None:
    folder = write_photos(tmp_path / "photos")
    (folder / "labels.csv").write_text(LABELS)
    (folder / "0.jpg").write_bytes(b"\xff\xd8 nothing")
    found = file_samples([str(folder / source)], FED, 3, CLASSES)
    assert found.truth_NC is not None
    assert found.truth_NC.tolist() == [[False, False, False], [False, False, True]]
    assert file_samples([str(folder)], FED, 3, NO_CLASSES).truth_NC is None


def test_labels_of_other_classes_are_said_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path / "photos")
    (folder / "labels.csv").write_text(LABELS.replace("bird", "zebra"))
    with caplog.at_level(logging.WARNING, "cliplet"):
        assert file_samples([str(folder)], FED, 3, CLASSES).truth_NC is None
    assert "mAP is not compared on" in caplog.text and "zebra" in caplog.text


def test_images_without_labels_among_others_have_no_truth(tmp_path: Path) -> None:
    labelled, plain = write_photos(tmp_path / "labelled"), write_photos(tmp_path / "plain")
    (labelled / "labels.csv").write_text(LABELS)
    assert file_samples([str(labelled), str(plain)], FED, 6, CLASSES).truth_NC is None
