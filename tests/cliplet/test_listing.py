"""Finding inputs: every kind of source, and nothing that was named vanishes."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cliplet.archives
from cliplet.errors import DataError, UsageError
from cliplet.images import ImageError, read_image
from cliplet.listing import find_images


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that sources can be typed as a user types them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*names: str) -> None:
    """Files that hold their own name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def paths(*sources: str) -> list[str]:
    return [ref.path for ref in find_images(sources).images]


def archive(name: str, *members: str | tuple[str, str, bytes], mode: str = "w") -> None:
    """A tar archive; a member is a name (its content) or (name, target, type of link)."""
    with tarfile.open(name, mode) as tar:  # type: ignore[call-overload]
        for member in members:
            info = tarfile.TarInfo(member if isinstance(member, str) else member[0])
            body = info.name.encode()
            if isinstance(member, str):
                info.size = len(body)
            else:
                info.linkname, info.type = member[1:]
            tar.addfile(info, io.BytesIO(body))


TREE = (
    "p/b.jpg",
    "p/a.PNG",
    "p/sub/c.jpeg",
    "p/sub/deep/d.webp",
    "p/.hid.jpg",
    "p/.git/e.jpg",
    "p/n.mp4",
    "p/x",
)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("p", ["p/a.PNG", "p/b.jpg", "p/sub/c.jpeg", "p/sub/deep/d.webp"]),
        ("p/", ["p/a.PNG", "p/b.jpg", "p/sub/c.jpeg", "p/sub/deep/d.webp"]),
        ("./p/sub", ["./p/sub/c.jpeg", "./p/sub/deep/d.webp"]),
        (".", ["./p/a.PNG", "./p/b.jpg", "./p/sub/c.jpeg", "./p/sub/deep/d.webp"]),
        ("p/b.jpg", ["p/b.jpg"]),
        ("p/n.mp4", ["p/n.mp4"]),
        ("p/x", ["p/x"]),
        ("p/.hid.jpg", ["p/.hid.jpg"]),
        ("p/*.jpg", ["p/b.jpg"]),
        ("p/?.[jP]*", ["p/a.PNG", "p/b.jpg"]),
        ("p/*", ["p/a.PNG", "p/b.jpg", "p/sub/c.jpeg", "p/sub/deep/d.webp"]),
        ("p/*.mp4", ["p/n.mp4"]),
        ("*/sub", ["p/sub/c.jpeg", "p/sub/deep/d.webp"]),
        ("**/*.jpg", ["p/b.jpg"]),
        ("p/**", ["p/a.PNG", "p/b.jpg", "p/sub/c.jpeg", "p/sub/deep/d.webp"]),
        ("p/**/*.jp*g", ["p/b.jpg", "p/sub/c.jpeg"]),
        ("p/**/deep", ["p/sub/deep/d.webp"]),
        ("./*/**/d.*", ["./p/sub/deep/d.webp"]),
    ],
)
def test_sources_name_images_as_find_prints_them(source: str, expected: list[str]) -> None:
    put(*TREE)
    listing = find_images([source])
    assert [ref.path for ref in listing.images] == expected
    assert [read_image(ref).decode() for ref in listing.images] == [os.path.normpath(p) for p in expected]
    assert listing.duplicates == 0


def test_an_absolute_pattern(here: Path) -> None:
    put(*TREE)
    assert paths(f"{here}/p/**/c.*") == [f"{here}/p/sub/c.jpeg"]


def test_what_is_ignored_is_counted() -> None:
    put(*TREE, "p/sub/m.MP4")
    assert find_images(["p"]).ignored == {".mp4": 2, "(none)": 1}


@pytest.mark.parametrize("suffix", "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm".split())
def test_image_suffixes_in_any_case(suffix: str) -> None:
    put(f"p/a.{suffix}", f"p/b.{suffix.upper()}")
    assert paths("p") == [f"p/a.{suffix}", f"p/b.{suffix.upper()}"]


@pytest.mark.parametrize(
    "sources, expected, duplicates",
    [
        (["p", "p"], ["p/a.jpg", "p/b.jpg"], 2),
        (["p/b.jpg", "p"], ["p/b.jpg", "p/a.jpg"], 1),
        (["p", "./p/a.jpg"], ["p/a.jpg", "p/b.jpg"], 1),
        (["p/*", "p/**"], ["p/a.jpg", "p/b.jpg"], 2),
        (["p", "link"], ["p/a.jpg", "p/b.jpg"], 2),
        (["t.tar", "./t.tar"], ["t.tar::a.jpg"], 1),
        (["twice.tar"], ["twice.tar::a.jpg"], 1),
    ],
)
def test_an_input_named_twice_is_one(sources: list[str], expected: list[str], duplicates: int) -> None:
    put("p/a.jpg", "p/b.jpg")
    os.symlink("p", "link")
    archive("t.tar", "a.jpg")
    archive("twice.tar", "a.jpg", "a.jpg")
    listing = find_images(sources)
    assert [ref.path for ref in listing.images] == expected
    assert listing.duplicates == duplicates


def test_a_name_with_pattern_characters_wins_over_the_pattern() -> None:
    put("a[1].jpg", "a1.jpg", "b*.jpg", "bb.jpg")
    assert paths("a[1].jpg", "b*.jpg") == ["a[1].jpg", "b*.jpg"]


# Links, and what cannot be listed or read


def test_links_to_folders_are_followed_and_loops_end() -> None:
    put("outside/o.jpg", "p/a.jpg", "p/sub/b.jpg")
    os.symlink("../outside", "p/elsewhere")
    os.symlink("..", "p/sub/up")
    os.symlink("sub", "p/again")
    os.symlink("../outside", "outside/me")
    assert paths("p") == ["p/a.jpg", "p/elsewhere/o.jpg", "p/sub/b.jpg"]
    assert paths("p/**/*.jpg") == ["p/a.jpg", "p/elsewhere/o.jpg", "p/sub/b.jpg"]


def test_links_that_lead_nowhere_and_pipes_fail_when_they_are_read() -> None:
    put("p/a.jpg")
    os.symlink("nowhere", "p/broken.jpg")
    os.mkfifo("p/pipe.jpg")
    a, broken, pipe = find_images(["p"]).images
    assert read_image(a) == b"p/a.jpg"
    with pytest.raises(ImageError, match="No such file"):
        read_image(broken)
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(pipe)


def refuse(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system refuse to list one folder; permissions would not stop root."""
    scandir = os.scandir

    def guarded(path: str) -> object:
        if path == folder:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)


@pytest.mark.parametrize("source", ["p", "p/**/*.jpg", "p/*"])
def test_a_folder_that_may_not_be_read_is_an_input_that_fails(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("p/a.jpg", "p/closed/b.jpg", "p/z.jpg")
    refuse("p/closed", monkeypatch)
    listing = find_images([source])
    assert [ref.path for ref in listing.images] == ["p/a.jpg", "p/closed", "p/z.jpg"]
    assert listing.unreadable == ("p/closed",)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(listing.images[1])


def test_a_source_that_may_not_be_read_holds_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    put("p/a.jpg")
    refuse("p", monkeypatch)
    with pytest.raises(DataError, match="no images in p .*may not be read: p"):
        find_images(["p"])


def test_names_that_are_not_utf8_are_shown_escaped_and_read(here: Path) -> None:
    (here / "p").mkdir()
    with open(b"p/caf\xe9.jpg", "wb") as file:
        file.write(b"coffee")
    (ref,) = find_images(["p"]).images
    assert ref.path == "p/caf\\xe9.jpg"
    assert ref.path.encode()
    assert read_image(ref) == b"coffee"


# Lists


def test_a_list_names_inputs_one_a_line() -> None:
    put("p/a.jpg", "lists/b.jpg", "lists/p/a.jpg", "p/ü.dat", "p/folder.jpg/x")
    Path("lists/l.txt").write_bytes(
        "\ufeff# comment\r\n\r\np/a.jpg\r\n  b.jpg  \nmissing.jpg\np/ü.dat\np/folder.jpg\np/a.jpg".encode()
    )
    listing = find_images(["lists/l.txt"])
    expected = ["p/a.jpg", "lists/b.jpg", "missing.jpg", "p/ü.dat", "p/folder.jpg"]
    assert [ref.path for ref in listing.images] == expected
    assert listing.duplicates == 1
    for ref, reason in zip(listing.images[2::2], ["No such file", "a folder"], strict=False):
        with pytest.raises(ImageError, match=reason):
            read_image(ref)
    assert read_image(listing.images[1]) == b"lists/b.jpg"


def test_a_list_may_hold_names_that_are_not_utf8() -> None:
    Path("l.txt").write_bytes(b"caf\xe9.jpg\n")
    with open(b"caf\xe9.jpg", "wb") as file:
        file.write(b"coffee")
    (ref,) = find_images(["l.txt"]).images
    assert (ref.path, read_image(ref)) == ("caf\\xe9.jpg", b"coffee")


def test_a_pattern_reads_lists_and_archives_only_when_it_spells_their_suffix() -> None:
    put("p/a.jpg", "b.jpg")
    Path("p/l.txt").write_text("b.jpg")
    archive("p/s.tar", "m.jpg")
    assert paths("p/*") == ["p/a.jpg"]
    assert paths("p/*.txt") == ["b.jpg"]
    assert paths("p/*.tar", "p/**/*.tar") == ["p/s.tar::m.jpg"]


# Archives

PACK: list[tuple[str, Callable[[str], None]]] = [
    ("s.tar", lambda name: archive(name, "b.jpg", "./d/a.png", "a.json", ".x.jpg", "d/._a.png", "../c.gif")),
    (
        "s.tar.gz",
        lambda name: archive(name, "b.jpg", "./d/a.png", "a.json", ".x.jpg", "../c.gif", mode="w:gz"),
    ),
    ("s.TGZ", lambda name: archive(name, "b.jpg", "./d/a.png", "a.json", "../c.gif", mode="w:gz")),
    ("gz.tar", lambda name: archive(name, "b.jpg", "./d/a.png", "a.json", "../c.gif", mode="w:gz")),
    ("plain.tgz", lambda name: archive(name, "b.jpg", "./d/a.png", "a.json", "../c.gif")),
]


@pytest.mark.parametrize("name, pack", PACK, ids=[name for name, _ in PACK])
def test_archives_hold_inputs_in_their_order(name: str, pack: Callable[[str], None]) -> None:
    pack(name)
    listing = find_images([f"./{name}"])
    members = ["b.jpg", "./d/a.png", "../c.gif"]
    assert [ref.path for ref in listing.images] == [f"./{name}::{member}" for member in members]
    assert [ref.member for ref in listing.images] == members
    assert [read_image(ref).decode() for ref in listing.images] == members
    assert [read_image(ref).decode() for ref in reversed(listing.images)] == members[::-1]
    assert listing.ignored == {".json": 1}


def test_of_members_with_one_name_the_last_counts() -> None:
    with tarfile.open("t.tar", "w") as tar:
        for body in (b"old", b"newer"):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    (ref,) = find_images(["t.tar"]).images
    assert read_image(ref) == b"newer"


def test_links_in_archives() -> None:
    archive(
        "t.tar",
        "d/a.jpg",
        ("d/hard.jpg", "d/a.jpg", tarfile.LNKTYPE),
        ("d/soft.jpg", "../d/a.jpg", tarfile.SYMTYPE),
        ("d/lost.jpg", "gone.jpg", tarfile.SYMTYPE),
        ("d/loop.jpg", "loop.jpg", tarfile.SYMTYPE),
    )
    _, hard, soft, lost, loop = find_images(["t.tar"]).images
    assert read_image(hard) == read_image(soft) == b"d/a.jpg"
    for ref in (lost, loop):
        with pytest.raises(ImageError, match="not in the archive"):
            read_image(ref)


def test_many_threads_read_a_compressed_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliplet.archives, "_INFLATED_WINDOW_BYTES", 1 << 21)
    with tarfile.open("t.tgz", "w:gz") as tar:
        for n in range(60):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size = 100_000
            tar.addfile(info, io.BytesIO(bytes([n]) * info.size))
    refs = find_images(["t.tgz"]).images
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(read_image, [*refs, *reversed(refs)]))
    assert bodies == [bytes([n]) * 100_000 for n in [*range(60), *reversed(range(60))]]


# Refusals


def spoil(name: str, at: int, body: bytes) -> None:
    data = bytearray(Path(name).read_bytes())
    data[at : at + len(body)] = body
    Path(name).write_bytes(data)


def cut(name: str, size: int) -> None:
    Path(name).write_bytes(Path(name).read_bytes()[:size])


@pytest.mark.parametrize(
    "sources, error, message",
    [
        ([], UsageError, "no images were named"),
        (["phtos"], UsageError, "phtos does not exist(.|\n)*did you mean photos"),
        (["photos/b.jpg"], UsageError, "did you mean photos/a.jpg"),
        (["no/such/folder"], UsageError, "does not exist"),
        (["photos/*.gif"], UsageError, "nothing matches"),
        (["photos/**/*.gif"], UsageError, "nothing matches"),
        (["nowhere.jpg"], UsageError, "does not exist"),
        (["empty"], DataError, "no images in empty .found: nothing.(.|\n)*[.]jpg"),
        (["videos"], DataError, "no images in videos .found: 2 .mp4, 1 .mov"),
        (["empty.txt"], DataError, "no images in empty.txt"),
        (["binary.txt"], DataError, "binary.txt is not text"),
        (["empty.tar"], DataError, "no images in empty.tar"),
        (["text.tar"], DataError, "cannot read the archive text.tar"),
        (["cut.tar"], DataError, "cannot read the archive cut.tar: unexpected end of data"),
        (
            ["spoiled.tar"],
            DataError,
            "cannot read the archive spoiled.tar: damaged after 1 members, at byte 1,024",
        ),
        (["cut.tgz"], DataError, "cannot read the archive cut.tgz"),
        (["text.tgz"], DataError, "cannot read the archive text.tgz"),
    ],
)
def test_what_cannot_be_found_is_refused_with_the_reason(
    sources: list[str], error: type[Exception], message: str
) -> None:
    put("photos/a.jpg", "videos/a.mp4", "videos/b.mp4", "videos/c.mov", "text.tar", "text.tgz")
    os.mkdir("empty")
    os.symlink("gone", "nowhere.jpg")
    Path("empty.txt").write_text("# nothing\n\n")
    Path("binary.txt").write_bytes(b"\0\1\2")
    archive("empty.tar")
    for name in ("cut.tar", "spoiled.tar"):
        archive(name, "a.jpg", "b.jpg")
    cut("cut.tar", 1024 + 512 + 3)
    spoil("spoiled.tar", 1024, b"\xff" * 100)
    Path("cut.tgz").write_bytes(gzip.compress(Path("spoiled.tar").read_bytes())[:60])
    with pytest.raises(error, match=message):
        find_images(sources)
