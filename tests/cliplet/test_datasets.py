"""Readers of data sets, on tiny copies of the official formats."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cliplet.datasets import SPLITS, Dataset, open_dataset
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.vocabulary import ClassName, Vocabulary, known_vocabulary

VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
# -1 absent, 0 only difficult objects, 1 present.
VOC_LABELS = {
    "2008_000002": {"tvmonitor": 1, "person": 0},
    "2008_000003": {"person": 1, "train": 1},
    "2008_000007": {"boat": 0},
}
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def voc_devkit(root: Path, labels: dict[str, dict[str, int]], split: str = "train", year: int = 2012) -> Path:
    """A devkit as the archive holds it; returns the folder VOC<year>."""
    devkit = root / "VOCdevkit" / f"VOC{year}"
    sets = devkit / "ImageSets" / "Main"
    write(sets / f"{split}.txt", "".join(f"{name}\n" for name in labels))
    for kind in VOC:
        rows = (f"{name} {of.get(kind, -1):2d}\n" for name, of in labels.items())
        write(sets / f"{kind}_{split}.txt", "".join(rows))
    for name, of in labels.items():
        touch(devkit / "JPEGImages" / f"{name}.jpg")
        write(devkit / "Annotations" / f"{name}.xml", voc_xml(name, of))
    return devkit


def voc_xml(name: str, labels: dict[str, int]) -> str:
    objects = "".join(
        f"<object><name>{kind}</name><difficult>{1 - label}</difficult>"
        "<part><name>head</name><bndbox/></part></object>"
        # A present class may have difficult objects too.
        + (f"<object><name>{kind}</name><difficult>1</difficult></object>" if label == 1 else "")
        for kind, label in labels.items()
        if label >= 0
    )
    return f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"


def positives(dataset: Dataset) -> dict[str, set[str]]:
    """Names of the classes of every image, by the image's file name."""
    assert dataset.truth_NC is not None
    names = np.array(dataset.vocabulary.names)
    return {
        Path(path).name: set(names[row].tolist())
        for path, row in zip(dataset.paths, dataset.truth_NC, strict=True)
    }


def opened(kind: str, root: Path, split: str, **options: object) -> Dataset:
    return open_dataset(kind, root, split, check_counts=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_the_devkit_or_above_it(tmp_path: Path, below: str) -> None:
    voc_devkit(tmp_path, VOC_LABELS)
    dataset = opened("voc12", tmp_path / below, "train")
    assert dataset.vocabulary.names == known_vocabulary("voc12").names
    assert positives(dataset) == {"2008_000002.jpg": {"tv monitor"}, "2008_000003.jpg": {"person", "train"}}
    assert dataset.paths[0] == str(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2008_000002.jpg")
    assert any("1 of 3 images dropped" in note for note in dataset.notes)
    assert any("difficult" in note and "negative" in note for note in dataset.notes)


def test_voc_difficult_objects_as_positive(tmp_path: Path) -> None:
    voc_devkit(tmp_path, VOC_LABELS, "test", 2007)
    dataset = opened("voc07", tmp_path, "test", difficult="positive")
    assert positives(dataset) == {
        "2008_000002.jpg": {"tv monitor", "person"},
        "2008_000003.jpg": {"person", "train"},
        "2008_000007.jpg": {"boat"},
    }
    assert any("positive" in note for note in dataset.notes)


def test_voc_without_class_lists_says_where_the_truth_is_from(tmp_path: Path) -> None:
    devkit = voc_devkit(tmp_path, VOC_LABELS)
    from_lists = opened("voc12", tmp_path, "train")
    for file in (devkit / "ImageSets" / "Main").glob("*_train.txt"):
        file.unlink()
    from_xml = opened("voc12", tmp_path, "train")
    assert positives(from_xml) == positives(from_lists)
    assert any("XML" in note for note in from_xml.notes)
    assert not any("XML" in note for note in from_lists.notes)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(VOC), st.sampled_from([-1, 0, 1])), min_size=1, max_size=4))
def test_voc_conventions_differ_only_by_difficult(
    tmp_path_factory: pytest.TempPathFactory, labels: list[dict[str, int]]
) -> None:
    root = tmp_path_factory.mktemp("voc")
    named = {f"2008_{n:06d}": {"cat": 1, **of} for n, of in enumerate(labels)}
    named["2008_000099"] = {"dog": 1}
    voc_devkit(root, named)
    for difficult, least in (("negative", 1), ("positive", 0)):
        expected = {f"{n}.jpg": {k for k, v in of.items() if v >= least} for n, of in named.items()}
        found = positives(opened("voc12", root, "train", difficult=difficult))
        spelled = {image: {kind.replace(" ", "") for kind in kinds} for image, kinds in found.items()}
        assert spelled == {image: kinds for image, kinds in expected.items() if kinds}


def test_voc12_test_has_no_truth(tmp_path: Path) -> None:
    voc_devkit(tmp_path, VOC_LABELS)
    sets = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    write(sets / "test.txt", "2008_000002\n")
    dataset = opened("voc12", tmp_path, "test")
    assert dataset.truth_NC is None
    assert len(dataset.images) == 1
    assert dataset.subset([0]).truth_NC is None


def edit(file: str, text: str | None) -> Callable[[Path], None]:
    """A change to one file below a root: its new text, or its removal."""

    def change(root: Path) -> None:
        if text is None:
            (root / file).unlink()
        else:
            write(root / file, text)

    return change


SETS = "VOCdevkit/VOC2012/ImageSets/Main/"
XML = "VOCdevkit/VOC2012/Annotations/2008_000003.xml"


@pytest.mark.parametrize(
    ("change", "difficult", "message"),
    [
        (edit(SETS + "cow_train.txt", None), "negative", "cow_train.txt is missing"),
        (edit(SETS + "cow_train.txt", "2008_000002 -1\n"), "negative", "cow_train.txt lists 1 images"),
        (edit(SETS + "cow_train.txt", ""), "negative", "cow_train.txt is empty"),
        (edit(SETS + "cow_train.txt", "2008_000002\n"), "negative", "the line '2008_000002'"),
        (edit(SETS + "cow_train.txt", "2008_000002 2\n"), "negative", "the line '2008_000002 2'"),
        (edit(SETS + "train.txt", None), "positive", "train.txt is missing"),
        (edit(SETS + "train.txt", "a b\n"), "positive", "line 1 of"),
        (edit(XML, None), "positive", "cannot read the annotation"),
        (edit(XML, "<annotation>"), "positive", "cannot read the annotation"),
        (edit(XML, voc_xml("x", {"unicorn": 1})), "positive", "'unicorn'"),
    ],
)
def test_a_broken_devkit_is_refused(
    tmp_path: Path, change: Callable[[Path], None], difficult: str, message: str
) -> None:
    voc_devkit(tmp_path, VOC_LABELS)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        opened("voc12", tmp_path, "train", difficult=difficult)
    assert caught.value.fix


def test_official_sizes_are_checked(tmp_path: Path) -> None:
    voc_devkit(tmp_path, VOC_LABELS)
    with pytest.raises(DataError, match="(?s)has 2 images.*5,717.*--no-count-check"):
        open_dataset("voc12", tmp_path, "train")


def test_missing_images_are_an_error_only_together(tmp_path: Path) -> None:
    devkit = voc_devkit(tmp_path, VOC_LABELS)
    (devkit / "JPEGImages" / "2008_000002.jpg").unlink()
    assert len(opened("voc12", tmp_path, "train").images) == 2
    (devkit / "JPEGImages" / "2008_000003.jpg").unlink()
    with pytest.raises(DataError, match="none of the 2 images"):
        opened("voc12", tmp_path, "train")


def test_a_vocabulary_of_ones_own_moves_the_columns(tmp_path: Path) -> None:
    voc_devkit(tmp_path, VOC_LABELS)
    own = Vocabulary(
        (ClassName("television", ("TV_monitor",)), *(ClassName(n) for n in reversed(VOC[:-1]))), source="mine"
    )
    dataset = opened("voc12", tmp_path, "train", vocabulary=own)
    assert positives(dataset) == {"2008_000002.jpg": {"television"}, "2008_000003.jpg": {"person", "train"}}
    for classes in (VOC[:-1], [*VOC, "unicorn"]):
        other = Vocabulary(tuple(ClassName(n) for n in classes), source="mine")
        with pytest.raises(DataError):
            opened("voc12", tmp_path, "train", vocabulary=other)


def coco_content() -> dict[str, list[dict[str, object]]]:
    ids = [n for n in range(1, 91) if n not in COCO_GAPS]
    names = known_vocabulary("coco").names
    outline = [[1.5, 2.5, 3.5, 4.5]]
    boxes = [(42, 90), (42, 90), (42, 1), (9, 13)]
    return {
        "info": {"description": "COCO"},  # type: ignore[dict-item]
        "licenses": [{"id": 42, "name": "a licence"}],
        "images": [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "height": 9} for n in (42, 7, 9)],
        "annotations": [
            {
                "segmentation": {"counts": [1, 2], "size": [3, 3]} if k == 3 else outline,
                "iscrowd": int(k == 3),
                "image_id": image,
                "bbox": [1, 2, 3, 4],
                "category_id": category,
                "id": k,
            }
            for k, (image, category) in enumerate(boxes)
        ],
        "categories": [
            {"supercategory": "x", "id": n, "name": name} for n, name in zip(ids, names, strict=True)
        ],
    }


def coco_folder(root: Path, content: object, images: str = "train2014") -> None:
    write(root / "annotations" / "instances_train2014.json", json.dumps(content))
    touch(root / images / "COCO_train2014_000000000042.jpg")


@pytest.mark.parametrize(("split", "images"), [("train", "train2014"), ("train2014", "images/train2014")])
def test_coco_keeps_images_with_boxes(tmp_path: Path, split: str, images: str) -> None:
    coco_folder(tmp_path / "coco", coco_content(), images)
    dataset = opened("coco14", tmp_path, split)
    assert positives(dataset) == {
        "COCO_train2014_000000000042.jpg": {"toothbrush", "person"},
        "COCO_train2014_000000000009.jpg": {"stop sign"},
    }
    assert dataset.split == "train"
    assert Path(dataset.paths[0]).is_file()
    assert dataset.notes == ("1 of 3 images dropped: no box",)


def without(part: str) -> dict[str, list[dict[str, object]]]:
    return {key: value for key, value in coco_content().items() if key != part}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not an object", "no images, annotations and categories"),
        (without("categories"), "no images, annotations and categories"),
        ({**coco_content(), "categories": [{"id": 1, "name": "person"}]}, "80 classes and .* labels 1"),
        ({**coco_content(), "categories": [{"id": 1, "name": "unicorn"}]}, "'unicorn'"),
        ({**coco_content(), "categories": [{"id": 1}]}, "lacks, or points to a missing, 'name'"),
        ({**coco_content(), "annotations": [{"image_id": 5, "category_id": 1}]}, "missing, 5"),
        ({**coco_content(), "annotations": [{"image_id": 42, "category_id": 12}]}, "missing, 12"),
        ({**coco_content(), "images": [{"id": 42}, {"id": 9}]}, "'file_name'"),
    ],
)
def test_annotations_that_are_not_cocos(tmp_path: Path, content: object, message: str) -> None:
    coco_folder(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        opened("coco14", tmp_path, "train")
    assert "instances_train2014.json" in str(caught.value)


def test_coco_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotations of val2017"):
        opened("coco17", tmp_path, "val")
    coco_folder(tmp_path, coco_content())
    file = tmp_path / "annotations" / "instances_train2014.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match="cannot read .*instances_train2014"):
        opened("coco14", tmp_path, "train")
    (tmp_path / "train2014").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no images of train2014"):
        opened("coco14", tmp_path, "train")


NUS_TRAIN = {
    "actor\\0001_2124494179.jpg": {"person", "sky"},
    "zoo\\0002_12.jpg": set(),
    "zoo\\3.jpg": {"zebra"},
}


def nus_folder(root: Path) -> None:
    """As the official archives unpack, with the line ends of Windows."""
    write(root / "ImageList" / "TrainImagelist.txt", "".join(f"{name}\r\n" for name in NUS_TRAIN))
    for concept in known_vocabulary("nus").names:
        labels = "".join(f"{int(concept in of)}\n" for of in NUS_TRAIN.values())
        write(root / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_Train.txt", labels)
    for name in NUS_TRAIN:
        touch(root / "Flickr" / name.replace("\\", "/"))


@pytest.mark.parametrize("above", ["", "NUS-WIDE"])
def test_nus_keeps_images_without_a_concept(tmp_path: Path, above: str) -> None:
    nus_folder(tmp_path / above)
    dataset = opened("nus", tmp_path, "train")
    expected = {name.split("\\")[1]: concepts for name, concepts in NUS_TRAIN.items()}
    assert positives(dataset) == expected
    assert all(Path(path).is_file() for path in dataset.paths)
    assert "1 of 3 images" in dataset.notes[0]
    with pytest.raises(DataError, match="161,789"):
        open_dataset("nus", tmp_path, "train")
    with pytest.raises(DataError, match="no list of test images"):
        opened("nus", tmp_path, "test")


NUS_LABELS = "Groundtruth/TrainTestLabels/Labels_lake_Train.txt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(NUS_LABELS, None), "Labels_lake_Train.txt is missing"),
        (edit(NUS_LABELS, "0\n1\n"), "(?s)has 2 lines.*3 images"),
        (edit(NUS_LABELS, "0\n1\n-1\n"), "some of them .'-1'."),
        (edit("ImageList/TrainImagelist.txt", "actor\n"), "line 1 of .* 'actor'"),
        (edit("ImageList/TrainImagelist.txt", "a\\1.jpg\n../../x.jpg\n"), "line 2 of"),
        (edit("ImageList/TrainImagelist.txt", "\n"), "is empty"),
    ],
)
def test_broken_lists_of_nus(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    nus_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        opened("nus", tmp_path, "train")


def ccd_arrays(folder: Path, names: object, labels: object, split: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"formatted_{split}_images.npy", names)  # type: ignore[arg-type]
    np.save(folder / f"formatted_{split}_labels.npy", labels)  # type: ignore[arg-type]


CCD_NAMES = np.array(["2008_000002.jpg", "2008_000003.jpg"])
CCD_LABELS = np.zeros((2, 20))
CCD_LABELS[0, 19] = CCD_LABELS[1, [14, 18]] = 1


@pytest.mark.parametrize(
    ("arrays", "images", "root"),
    [
        (".", "VOCdevkit/VOC2012/JPEGImages", "."),
        ("metadata/voc12", "VOC2012/JPEGImages", "."),
        ("voc12", "JPEGImages", "voc12"),
        ("data/metadata/voc12", "data/JPEGImages", "data/metadata"),
        ("JPEGImages/arrays", "JPEGImages", "JPEGImages/arrays"),
    ],
)
def test_ccd_arrays_beside_below_and_above_the_images(
    tmp_path: Path, arrays: str, images: str, root: str
) -> None:
    ccd_arrays(tmp_path / arrays, CCD_NAMES, CCD_LABELS)
    touch(tmp_path / images / "2008_000003.jpg")
    dataset = opened("ccd", tmp_path / root, "train")
    assert dataset.vocabulary.names == known_vocabulary("voc").names
    assert positives(dataset) == {"2008_000002.jpg": {"tv monitor"}, "2008_000003.jpg": {"person", "train"}}
    assert dataset.paths[1] == str(tmp_path / images / "2008_000003.jpg")
    assert str(tmp_path / images) in dataset.notes[0]


def test_ccd_columns_follow_the_vocabulary(tmp_path: Path) -> None:
    ccd_arrays(tmp_path, CCD_NAMES, CCD_LABELS)
    touch(tmp_path / "2008_000003.jpg")
    turned = Vocabulary(tuple(ClassName(n) for n in reversed(VOC)))
    moved = opened("ccd", tmp_path, "train", vocabulary=turned)
    assert positives(moved) == {"2008_000002.jpg": {"tvmonitor"}, "2008_000003.jpg": {"person", "train"}}
    own = Vocabulary(tuple(ClassName(f"class {c}") for c in range(20)))
    assert positives(opened("ccd", tmp_path, "train", vocabulary=own))["2008_000002.jpg"] == {"class 19"}


@pytest.mark.parametrize(
    ("classes", "split", "images", "official"),
    [
        (20, "train", 5_717, "5,717 or 5,011"),
        (20, "train", 5_011, "5,717 or 5,011"),
        (20, "val", 5_823, "5,823 or 4,952"),
        (80, "val", 40_137, "40,137"),
        (81, "val", 60_260, "60,260"),
    ],
)
def test_sizes_of_ccd_arrays_follow_their_classes(
    tmp_path: Path, classes: int, split: str, images: int, official: str
) -> None:
    names = np.array([f"{n}.jpg" for n in range(images)])
    touch(tmp_path / "0.jpg")
    ccd_arrays(tmp_path, names, np.zeros((images, classes), bool), split)
    assert len(open_dataset("ccd", tmp_path, split).images) == images
    ccd_arrays(tmp_path, names[:-1], np.zeros((images - 1, classes), bool), split)
    said = f"(?s){images - 1:,} images of {classes} classes.*official {official}, .*--no-count-check"
    with pytest.raises(DataError, match=said):
        open_dataset("ccd", tmp_path, split)


def test_ccd_arrays_of_other_classes_may_have_any_size(tmp_path: Path) -> None:
    touch(tmp_path / "2008_000002.jpg")
    ccd_arrays(tmp_path, CCD_NAMES, CCD_LABELS[:, :7])
    own = Vocabulary(tuple(ClassName(f"class {c}") for c in range(7)))
    assert len(open_dataset("ccd", tmp_path, "train", vocabulary=own).images) == 2


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (CCD_NAMES.astype(object), CCD_LABELS, "(?s)cannot read .*images.npy.*trust"),
        (np.array([1, 2]), CCD_LABELS, r"int64 \[2\]"),
        (CCD_NAMES[:, None], CCD_LABELS, r"\[2, 1\]"),
        (CCD_NAMES[:0], CCD_LABELS[:0], r"\[0\]"),
        (CCD_NAMES, CCD_LABELS[:1], r"(?s)\[1, 20\].*2 images"),
        (CCD_NAMES, CCD_LABELS[0], r"\[20\]"),
        (CCD_NAMES, CCD_LABELS - 1, "other than 0 and 1"),
        (CCD_NAMES, CCD_LABELS * np.nan, "other than 0 and 1"),
        (CCD_NAMES, CCD_LABELS.astype(str), "<U"),
        (CCD_NAMES, CCD_LABELS[:, :7], "labels of 7 classes"),
        (np.array(["a.jpg", "b.jpg"]), CCD_LABELS, "no folder near"),
    ],
)
def test_broken_arrays(tmp_path: Path, names: object, labels: object, message: str) -> None:
    ccd_arrays(tmp_path / "arrays", names, labels)
    touch(tmp_path / "2008_000003.jpg")
    with pytest.raises(DataError, match=message):
        opened("ccd", tmp_path / "arrays", "train")


def test_arrays_that_are_missing_or_many(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no formatted_val_images.npy"):
        opened("ccd", tmp_path, "val")
    for name in ("voc07", "voc12"):
        ccd_arrays(tmp_path / "metadata" / name, CCD_NAMES, CCD_LABELS)
    with pytest.raises(DataError, match="2 folders"):
        opened("ccd", tmp_path, "train")
    (tmp_path / "metadata" / "voc07" / "formatted_train_labels.npy").write_text("no array")
    with pytest.raises(DataError, match="cannot read .*labels.npy"):
        opened("ccd", tmp_path / "metadata" / "voc07", "train")


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_scenes_by_their_part(tmp_path: Path, layout: str) -> None:
    worlds = {part: scene_world(part, seed=3) for part in ("train", "test-seen")}
    for part, count in (("train", 3), ("test-seen", 2)):
        write_scenes(worlds[part], tmp_path, count, layout=layout)
    dataset = opened("scenes", tmp_path, "test-seen")
    truth = {f"test-seen_{n:06d}.jpg": set(worlds["test-seen"].scene(n).classes) for n in range(2)}
    assert positives(dataset) == truth
    assert all(Path(path).is_file() for path in dataset.paths)
    with pytest.raises(DataError, match="--part test-unseen"):
        opened("scenes", tmp_path, "test-unseen")
    other = {"voc": "images", "coco": "JPEGImages"}[layout]
    touch(tmp_path / other / "train_000000.jpg")
    with pytest.raises(DataError, match="both in"):
        opened("scenes", tmp_path, "train")
    for image in tmp_path.glob("*/train_*.jpg"):
        image.unlink()
    with pytest.raises(DataError, match="(?s)is there.*cliplet scenes"):
        opened("scenes", tmp_path, "train")


def own_folder(root: Path, labels: str | None = "file,classes\na.jpg,cat;dog\nsub/b.jpg,\n") -> Path:
    touch(root / "a.jpg")
    touch(root / "sub" / "b.jpg")
    write(root / "classes.txt", "dog: puppy\ncat\nfish, big\n")
    if labels is not None:
        write(root / "labels.csv", labels)
    return root


def test_a_folder_with_labels(tmp_path: Path) -> None:
    dataset = opened("folder", own_folder(tmp_path), "all")
    assert dataset.vocabulary.names == ("dog", "cat", "fish, big")
    assert positives(dataset) == {"a.jpg": {"cat", "dog"}, "b.jpg": set()}
    chosen = dataset.subset([1, 0, 1])
    assert [Path(path).name for path in chosen.paths] == ["b.jpg", "a.jpg", "b.jpg"]
    assert chosen.truth_NC is not None
    assert chosen.truth_NC.tolist() == [[False] * 3, [True, True, False], [False] * 3]
    assert "3 of 2 images chosen" in chosen.notes


def test_rows_may_have_any_order_file_names_synonyms_and_quotes(tmp_path: Path) -> None:
    labels = '\ufefffile,classes\nb.jpg,"fish, big; cat"\n./a.jpg,Puppy\n'
    dataset = opened("folder", own_folder(tmp_path, labels), "all")
    assert positives(dataset) == {"a.jpg": {"dog"}, "b.jpg": {"cat", "fish, big"}}


def test_a_folder_without_labels_says_so(tmp_path: Path) -> None:
    own = Vocabulary((ClassName("bird"),))
    dataset = opened("folder", own_folder(tmp_path, None), "all", vocabulary=own)
    assert dataset.truth_NC is None
    assert dataset.vocabulary is own
    assert "no labels" in dataset.notes[0]
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UsageError, match="--classes"):
        opened("folder", tmp_path, "all")


def test_an_archive_takes_the_labels_beside_it(tmp_path: Path) -> None:
    own_folder(tmp_path / "data")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "data", "photos")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "labels.csv", "file,classes\na.jpg,cat\nphotos/sub/b.jpg,dog\n")
    dataset = opened("folder", tmp_path / "shard.tar", "all")
    assert positives(dataset) == {"a.jpg": {"cat"}, "b.jpg": {"dog"}}
    assert dataset.paths[0].endswith("shard.tar::photos/a.jpg")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "begins with 'nothing'"),
        ("name,labels\na.jpg,cat\n", "begins with"),
        ("file,classes\na.jpg,cat\nb.jpg,unicorn\n", "line 3 of .*'unicorn'"),
        ("file,classes\na.jpg,dgo\nb.jpg,\n", "(?s)'dgo'.*did you mean 'dog'"),
        ("file,classes\na.jpg,cat\nb.jpg,\nc.jpg,dog\n", "line 4 .*c.jpg is not among the images"),
        ("file,classes\na.jpg,cat\n", "1 of 2 images have no row .*b.jpg"),
        ("file,classes\na.jpg,cat\nb.jpg,\na.jpg,dog\n", "lines 2 and 4"),
        ("file,classes\na.jpg,cat\nb.jpg,\nsub/b.jpg,\n", "the image of line 3 too"),
        ("file,classes\na.jpg,cat,dog\nb.jpg,\n", "line 2 of .* has 3 cells"),
        ("file,classes\n,cat\nb.jpg,\n", "line 2 of"),
        ('file,classes\n"a.jpg,cat\n', "cannot read"),
    ],
)
def test_bad_labels(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened("folder", own_folder(tmp_path, labels), "all")


def test_a_file_name_of_two_images_is_not_enough(tmp_path: Path) -> None:
    touch(own_folder(tmp_path, "file,classes\nb.jpg,cat\n") / "other" / "b.jpg")
    with pytest.raises(DataError, match="the name of 2 images"):
        opened("folder", tmp_path, "all")


@pytest.mark.parametrize(
    ("kind", "split", "options", "error", "message"),
    [
        ("voc", "train", {}, UsageError, "did you mean voc"),
        ("voc12", "training", {}, UsageError, "one of train, val, trainval, test"),
        ("coco14", "train2017", {}, UsageError, "no split 'train2017'"),
        ("folder", "train", {}, UsageError, "one of all"),
        ("voc12", "train", {"difficult": "ignore"}, UsageError, "one of negative, positive"),
        ("nus", "train", {"difficult": "positive"}, UsageError, "Pascal VOC"),
        ("voc12", "train", {}, DataError, "no VOC2012 lists"),
        ("coco17", "val", {}, DataError, "no annotations"),
        ("nus", "train", {}, DataError, "no folder of NUS-WIDE's images"),
        ("scenes", "train", {}, UsageError, "no classes"),
        ("folder", "all", {}, DataError, "no images"),
    ],
)
def test_what_cannot_be_opened(
    tmp_path: Path, kind: str, split: str, options: dict[str, str], error: type[ClipletError], message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(kind, tmp_path, split, **options)


@pytest.mark.parametrize("kind", sorted(SPLITS))
def test_a_root_that_is_not_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        opened(kind, tmp_path / "nowhere", SPLITS[kind][0])
