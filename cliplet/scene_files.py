"""Scenes on disk, as people keep data sets: JPEGs with Pascal VOC's XML or COCO's JSON.

    write_scenes(scene_world("train", seed=0), Path("scenes"), 1000, layout="voc")

Beside them stand `classes.txt` (one name a line) and `labels.csv` (`file,classes`, names joined by `;`).
Several parts may be written to one folder: files begin with the part's name, and the lists are merged.
"""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from cliplet.errors import UsageError
from cliplet.processes import mapped
from cliplet.scenes import SceneObject, SceneWorld

LAYOUTS = ("voc", "coco")
IMAGE_FOLDERS = {"voc": "JPEGImages", "coco": "images"}
JPEG_QUALITY = 90
CHUNK = 50


@dataclass(frozen=True)
class Written:
    """What `write_scenes` left on disk: how many scenes, where their images are, and bytes in all."""

    scenes: int
    images: Path
    size: int


@dataclass(frozen=True)
class _Entry:
    file: str
    width: int
    height: int
    objects: tuple[SceneObject, ...]
    size: int

    @property
    def classes(self) -> str:
        return ";".join(sorted({o.name for o in self.objects}))


def write_scenes(
    world: SceneWorld,
    out: Path,
    count: int,
    *,
    layout: str = "voc",
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """What was written: the first `count` scenes of a world as JPEGs with their truth.

    Args:
        world: where the scenes come from.
        out: a folder, made where it is missing; an earlier run of the same part in it is replaced.
        count: number of scenes.
        layout: `voc` or `coco`.
        workers: processes; files are the same for any number.
        progress: called with the number of scenes just finished.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"no layout {layout!r}", f"one of {', '.join(LAYOUTS)}")
    if count < 1:
        raise UsageError(f"{count} scenes to write", "at least one", "--count 100")
    images = out / IMAGE_FOLDERS[layout]
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob(f"{world.part}_*.jpg"):
        old.unlink()
    entries: list[_Entry] = []
    for some in mapped(partial(_write_chunk, world, images, count), range(0, count, CHUNK), workers):
        entries.extend(some)
        if progress:
            progress(len(some))
    if layout == "voc":
        size = _write_voc(out, world.part, entries)
    else:
        size = _write_coco(out, world, entries)
    _write_lists(out, world, entries)
    return Written(len(entries), images, size + sum(entry.size for entry in entries))


def _write_chunk(world: SceneWorld, images: Path, count: int, start: int) -> list[_Entry]:
    entries = []
    for index in range(start, min(count, start + CHUNK)):
        scene = world.scene(index)
        path = images / f"{world.part}_{index:06d}.jpg"
        Image.fromarray(scene.image).save(path, quality=JPEG_QUALITY)
        height, width = scene.owners.shape
        entries.append(_Entry(path.name, width, height, scene.objects, path.stat().st_size))
    return entries


def _write_lists(out: Path, world: SceneWorld, entries: list[_Entry]) -> None:
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in world.classes), encoding="utf-8")
    labels = out / "labels.csv"
    rows = [(entry.file, entry.classes) for entry in entries]
    if labels.is_file():
        with labels.open(newline="", encoding="utf-8") as file:
            kept = [(row["file"], row["classes"]) for row in csv.DictReader(file)]
        rows = [row for row in kept if not row[0].startswith(f"{world.part}_")] + rows
    with labels.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "classes"), *rows])


def _write_voc(out: Path, part: str, entries: list[_Entry]) -> int:
    notes, sets = out / "Annotations", out / "ImageSets" / "Main"
    notes.mkdir(exist_ok=True)
    sets.mkdir(parents=True, exist_ok=True)
    for old in notes.glob(f"{part}_*.xml"):
        old.unlink()
    size = 0
    for entry in entries:
        tree = ET.ElementTree(_voc_annotation(entry))
        ET.indent(tree)
        path = notes / Path(entry.file).with_suffix(".xml").name
        tree.write(path, encoding="utf-8")
        size += path.stat().st_size
    listing = "".join(f"{Path(entry.file).stem}\n" for entry in entries)
    (sets / f"{part}.txt").write_text(listing, encoding="utf-8")
    return size + len(listing)


def _voc_annotation(entry: _Entry) -> ET.Element:
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = "scenes"
    ET.SubElement(root, "filename").text = entry.file
    size = ET.SubElement(root, "size")
    for tag, value in (("width", entry.width), ("height", entry.height), ("depth", 3)):
        ET.SubElement(size, tag).text = str(value)
    for thing in entry.objects:
        x0, y0, x1, y1 = thing.box
        node = ET.SubElement(root, "object")
        ET.SubElement(node, "name").text = thing.name
        at_edge = x0 == 0 or y0 == 0 or x1 == entry.width or y1 == entry.height
        ET.SubElement(node, "truncated").text = str(int(at_edge))
        ET.SubElement(node, "difficult").text = "0"
        ET.SubElement(node, "occluded").text = str(int(thing.visible < 0.95))
        box = ET.SubElement(node, "bndbox")
        # VOC counts pixels from 1 and includes the last one.
        for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            ET.SubElement(box, tag).text = str(value)
    return root


def _write_coco(out: Path, world: SceneWorld, entries: list[_Entry]) -> int:
    numbers = {name: k for k, name in enumerate(world.classes, start=1)}
    things = [(i, thing) for i, entry in enumerate(entries, start=1) for thing in entry.objects]
    content = {
        "info": {"description": f"cliplet scenes, part {world.part}, seed {world.seed}"},
        "images": [
            {"id": i, "file_name": entry.file, "width": entry.width, "height": entry.height}
            for i, entry in enumerate(entries, start=1)
        ],
        "annotations": [
            {
                "id": k,
                "image_id": i,
                "category_id": numbers[thing.name],
                "bbox": [
                    thing.box[0],
                    thing.box[1],
                    thing.box[2] - thing.box[0],
                    thing.box[3] - thing.box[1],
                ],
                "area": (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]),
                "iscrowd": 0,
            }
            for k, (i, thing) in enumerate(things, start=1)
        ],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    path = out / "annotations" / f"instances_{world.part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path.stat().st_size
