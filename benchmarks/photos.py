"""The images of a benchmark: a folder of photographs that is named, or scenes that are made for the run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

SCENES = 64


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take the folder, and what the record is to say of it."""
    parser.add_argument("--photos", type=Path, help="folder of images (default: scenes made for this run)")
    parser.add_argument("--photos-are", default="", help="what the record says of them")


@contextmanager
def photos_of(options: argparse.Namespace) -> Iterator[None]:
    """Context in which `options.photos` is a folder of images, and `options.photos_are` says what they are."""
    if options.photos is not None:
        options.photos_are = options.photos_are or f"the images of {options.photos.name}"
        yield
        return
    with TemporaryDirectory() as folder:
        options.photos = write_scenes(scene_world("test-seen", seed=1), Path(folder), SCENES).images
        options.photos_are = f"{SCENES} scenes of the scene world, 320 x 240"
        yield
