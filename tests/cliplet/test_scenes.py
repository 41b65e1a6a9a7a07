"""The scene world: the same scene every time, a truth that is true, parts that share nothing."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliplet.errors import DataError, UsageError
from cliplet.scene_files import IMAGE_FOLDERS, write_scenes
from cliplet.scenes import MIN_VISIBLE, PARTS, Scene, SceneWorld, scene_world
from cliplet.sprites import HELD_OUT_SETS, TRAINING_SETS, Pose, Sprite, posed, read_sprites


@pytest.fixture(scope="module")
def world() -> SceneWorld:
    return scene_world("train", seed=3)


@pytest.fixture(scope="module")
def scenes(world: SceneWorld) -> list[Scene]:
    return [world.scene(index) for index in range(120)]


def checksum(scene: Scene) -> int:
    return hash((scene.image.tobytes(), scene.objects))


def test_a_scene_is_the_same_alone_in_any_order_and_in_another_process(
    world: SceneWorld, scenes: list[Scene]
) -> None:
    again = scene_world("train", seed=3).scene(17)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        elsewhere = pool.submit(world.scene, 17).result()
    for other in (again, elsewhere):
        assert np.array_equal(other.image, scenes[17].image)
        assert other.objects == scenes[17].objects


def test_another_seed_part_or_index_is_another_scene(scenes: list[Scene]) -> None:
    others = [scene_world("train", seed=4).scene(5), scene_world("test-seen", seed=3).scene(5), scenes[6]]
    assert len({checksum(scene) for scene in [scenes[5], *others]}) == 4


def test_a_scene_is_an_image_with_one_to_five_objects(scenes: list[Scene]) -> None:
    assert {scene.image.shape[:2] for scene in scenes} == {(240, 320), (320, 240), (256, 256)}
    assert all(scene.image.dtype == np.uint8 and scene.image.shape[2] == 3 for scene in scenes)
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4, 5}


def test_boxes_are_tight_around_visible_pixels(scenes: list[Scene]) -> None:
    for scene in scenes:
        for number, thing in enumerate(scene.objects, start=1):
            x0, y0, x1, y1 = thing.box
            mine = scene.owners == number
            assert mine[y0:y1, x0:x1].sum() == mine.sum() > 0
            assert mine[y0].any() and mine[y1 - 1].any() and mine[:, x0].any() and mine[:, x1 - 1].any()


def test_every_object_of_the_truth_can_be_seen(scenes: list[Scene]) -> None:
    visible = [thing.visible for scene in scenes for thing in scene.objects]
    assert min(visible) >= MIN_VISIBLE and max(visible) <= 1
    assert min(visible) < 0.7, "no scene has any occlusion"


def test_owned_pixels_differ_from_the_background() -> None:
    """The pixels the truth points at are the object's: a white square shows where it says it is."""
    white = Image.new("RGBA", (40, 40), (255, 255, 255, 255))
    white.putpixel((0, 0), (0, 0, 0, 0))
    shown = posed(
        Sprite("set/square/white", white, white),
        Pose(side=40, degrees=0, flip=False, slant=0, colours=(1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)),
    )
    assert shown.size == (40, 40)
    assert np.asarray(shown)[5:35, 5:35].min() == 255


def test_classes_have_a_long_tail_and_keep_company(world: SceneWorld) -> None:
    order = np.argsort(-world.chances)
    assert world.classes[order[0]] == "person"
    assert world.chances[order[0]] > 6 * world.chances[order[-1]]
    assert world.chances.sum() == pytest.approx(1)
    flat = scene_world("train", tail=0.0)
    assert np.ptp(flat.chances) == pytest.approx(0)


def test_counts_follow_the_long_tail(world: SceneWorld) -> None:
    rng = np.random.default_rng(0)
    names = Counter(name for _ in range(3000) for name in world._names(rng))
    assert names["person"] > 4 * names["sofa"]
    assert set(names) == set(world.classes)


@pytest.mark.parametrize(
    ("part", "sets"), [("train", TRAINING_SETS), ("test-seen", TRAINING_SETS), ("test-unseen", HELD_OUT_SETS)]
)
def test_parts_keep_their_drawings_apart(part: str, sets: tuple[str, ...]) -> None:
    world = scene_world(part)
    drawn = {sprite.name.split("/")[0] for sprites in world.sprites.values() for sprite in sprites}
    assert drawn == set(sets)
    assert not set(TRAINING_SETS) & set(HELD_OUT_SETS)
    assert world.scene(0).objects[0].drawing.split("/")[0] in sets


def test_all_parts_know_the_same_classes() -> None:
    assert len({scene_world(part).classes for part in PARTS}) == 1


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_files_do_not_depend_on_the_number_of_processes(tmp_path: Path, layout: str) -> None:
    world = scene_world("train", seed=1)
    one = write_scenes(world, tmp_path / "one", 60, layout=layout, workers=1)
    write_scenes(world, tmp_path / "two", 60, layout=layout, workers=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert one.scenes == 60 and len(list(one.images.iterdir())) == 60
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def labels_of(folder: Path) -> dict[str, set[str]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: set(row["classes"].split(";")) for row in csv.DictReader(file)}


def test_voc_files_agree_with_the_labels_and_the_scenes(tmp_path: Path) -> None:
    world = scene_world("train", seed=2)
    write_scenes(world, tmp_path, 12)
    labels = labels_of(tmp_path)
    stems = (tmp_path / "ImageSets" / "Main" / "train.txt").read_text().split()
    assert [f"{stem}.jpg" for stem in stems] == list(labels)
    for index, stem in enumerate(stems):
        root = ET.parse(tmp_path / "Annotations" / f"{stem}.xml").getroot()
        with Image.open(tmp_path / "JPEGImages" / str(root.findtext("filename"))) as image:
            assert image.size == (int(root.findtext("size/width", "")), int(root.findtext("size/height", "")))
        assert {str(o.findtext("name")) for o in root.iter("object")} == labels[f"{stem}.jpg"]
        first = world.scene(index).objects[0].box
        box = [int(root.findtext(f"object/bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax")]
        assert box == [first[0] + 1, first[1] + 1, first[2], first[3]]


def test_coco_files_agree_with_the_labels_and_the_scenes(tmp_path: Path) -> None:
    world = scene_world("test-unseen", seed=2)
    write_scenes(world, tmp_path, 12, layout="coco")
    content = json.loads((tmp_path / "annotations" / "instances_test-unseen.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    said: dict[str, set[str]] = {}
    for note in content["annotations"]:
        said.setdefault(files[note["image_id"]], set()).add(names[note["category_id"]])
    assert said == labels_of(tmp_path)
    assert (tmp_path / "classes.txt").read_text().split("\n")[:-1] == list(world.classes)
    x0, y0, x1, y1 = world.scene(0).objects[0].box
    assert content["annotations"][0]["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_two_parts_share_a_folder_and_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    write_scenes(scene_world("train"), tmp_path, 5)
    write_scenes(scene_world("test-seen"), tmp_path, 3)
    write_scenes(scene_world("train"), tmp_path, 2)
    files = Counter(name.rsplit("_", 1)[0] for name in labels_of(tmp_path))
    assert files == {"train": 2, "test-seen": 3}
    assert len(list((tmp_path / IMAGE_FOLDERS["voc"]).iterdir())) == 5
    assert len(list((tmp_path / "Annotations").iterdir())) == 5


def cutout(path: Path, mode: str = "RGBA", alpha: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (32, 32), (200, 30, 30, 255))
    image.paste((0, 0, 0, alpha), (0, 0, 8, 32))
    image.convert(mode).save(path)


def test_anybodys_cut_outs_make_a_world(tmp_path: Path) -> None:
    cutout(tmp_path / "red square" / "a.png")
    cutout(tmp_path / "lamp" / "b.png")
    world = scene_world("train", sprites=tmp_path)
    assert world.classes == ("lamp", "red square")
    assert set(world.scene(0).classes) <= {"lamp", "red square"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "no class folders"),
        (lambda folder: (folder / "dog").mkdir(), "no PNG files"),
        (lambda folder: cutout(folder / "dog" / "a.png", mode="RGB"), "no transparent pixel"),
        (lambda folder: cutout(folder / "dog" / "a.png", alpha=255), "no transparent pixel"),
        (
            lambda folder: [(folder / "dog").mkdir(), (folder / "dog" / "a.png").write_text("hello")],
            "cannot be read as an image",
        ),
    ],
)
def test_a_bad_folder_of_sprites_says_what_is_wrong(tmp_path: Path, make, says: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=says) as raised:
        read_sprites(tmp_path)
    assert str(tmp_path) in raised.value.happened
    assert raised.value.expected


def test_a_missing_folder_of_sprites_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        read_sprites(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: scene_world("validation"),
        lambda: scene_world("train", max_objects=0),
        lambda: SceneWorld({}),
        lambda: write_scenes(scene_world("train"), Path("unused"), 0),
        lambda: write_scenes(scene_world("train"), Path("unused"), 1, layout="yolo"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        ask()
    assert not list(tmp_path.iterdir())


def test_the_embedded_sprites_are_small_and_every_set_has_its_licence() -> None:
    folder = Path(read_sprites.__code__.co_filename).parent / "assets" / "sprites"
    sets = [path for path in folder.iterdir() if path.is_dir()]
    assert {path.name for path in sets} == {*TRAINING_SETS, *HELD_OUT_SETS}
    assert all((path / "LICENSE").stat().st_size > 500 for path in sets)
    assert sum(path.stat().st_size for path in folder.rglob("*.png")) < 2_000_000
