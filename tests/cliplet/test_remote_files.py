"""Inputs by URL: what is there is read, what passes is tried again, what is gone becomes a reason."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from cliplet import remote_files
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.images import ImageError, ImageRef, read_image
from cliplet.listing import Listing, find_images
from cliplet.remote_files import RemoteError, RemoteFile, is_remote, local_path, located, read_remote


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


class Site(ThreadingHTTPServer):
    """A web server with files in memory, and what it shall do wrong.

    Attributes:
        files: path to content.
        dies: path to how often the connection breaks off half-way.
        busy: path to how often the answer is a status instead, and which.
        asked: how often each path was asked for with GET.
        ranges: whether parts of files are served.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.dies: dict[str, int] = {}
        self.busy: dict[str, tuple[int, int]] = {}
        self.asked: Counter[str] = Counter()
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.asked[self._path] += 1
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self, with_body: bool) -> None:
        site, path = self.server, self._path
        times, status = site.busy.get(path, (0, 0))
        if times and with_body:
            site.busy[path] = (times - 1, status)
            self._send(status, b"", with_body)
        elif path not in site.files:
            self._send(404, b"", with_body)
        elif site.dies.get(path, 0) and with_body:
            site.dies[path] -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(site.files[path])))
            self.end_headers()
            self.wfile.write(site.files[path][:10])
            self.close_connection = True
        else:
            wanted = self.headers.get("Range") if site.ranges else None
            body = site.files[path]
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                body = body[int(first) : int(last) + 1]
            self._send(206 if wanted else 200, body, with_body)

    def _send(self, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def paths(listing: Listing) -> list[str]:
    return [ref.path for ref in listing.images]


def packed(*names: str, mode: str = "w") -> bytes:
    """A tar archive whose members hold their own name; a sidecar of webdataset beside each."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode=mode) as tar:  # type: ignore[call-overload]
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return body.getvalue()


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, remote, local",
    [
        ("s3://b/k.jpg", True, None),
        ("HTTPS://x/a.jpg", True, None),
        ("file:///a/b.jpg", True, "/a/b.jpg"),
        ("photos/a.jpg", False, None),
        ("c://x", False, None),
        ("a/b://c", False, None),
    ],
)
def test_urls_are_told_from_paths(name: str, remote: bool, local: str | None) -> None:
    assert (is_remote(name), local_path(name)) == (remote, local)
    assert located("/home", name) == (name if remote else f"/home/{name}")


# --- folders, patterns, lists --------------------------------------------------------------------------------

TREE = ("p/b.jpg", "p/a.PNG", "p/sub/c.jpeg", "p/.hid.jpg", "p/.git/e.jpg", "p/n.mp4", "p/list.txt")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("memory://p", ["memory://p/a.PNG", "memory://p/b.jpg", "memory://p/sub/c.jpeg"]),
        ("memory://p/", ["memory://p/a.PNG", "memory://p/b.jpg", "memory://p/sub/c.jpeg"]),
        ("memory:///p/sub", ["memory:///p/sub/c.jpeg"]),
        ("memory://p/b.jpg", ["memory://p/b.jpg"]),
        ("memory://p/n.mp4", ["memory://p/n.mp4"]),
        ("memory://p/*.jpg", ["memory://p/b.jpg"]),
        ("memory://p/**/*.jpeg", ["memory://p/sub/c.jpeg"]),
        ("memory://p/s*", ["memory://p/sub/c.jpeg"]),
        ("memory://p/*.txt", ["memory://p/b.jpg", "memory://q/gone.jpg", "memory://p/sub/c.jpeg"]),
        ("memory://p/{b,gone}.jpg", ["memory://p/b.jpg", "memory://p/gone.jpg"]),
    ],
)
def test_remote_sources_name_images_as_they_were_spelled(
    memory: fsspec.AbstractFileSystem, source: str, expected: list[str]
) -> None:
    for name in TREE:
        memory.pipe_file(f"/{name}", name.encode())
    memory.pipe_file("/p/list.txt", b"memory://p/b.jpg\n# no\n\nmemory://q/gone.jpg\nsub/c.jpeg\n")
    listing = find_images([source])
    assert paths(listing) == expected
    for ref in listing.images:
        if "gone" in ref.path:
            with pytest.raises(ImageError, match="No such file"):
                read_image(ref)
        else:
            assert read_image(ref).decode() == ref.path.removeprefix("memory://").strip("/")


def test_what_is_ignored_and_what_is_named_twice_is_counted(memory: fsspec.AbstractFileSystem) -> None:
    for name in TREE:
        memory.pipe_file(f"/{name}", b"x")
    listing = find_images(["memory://p", "memory://p/b.jpg"])
    assert listing.ignored == {".mp4": 1, ".txt": 1}
    assert listing.duplicates == 1


def test_a_remote_folder_that_may_not_be_read_is_an_input_that_fails(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/p/a.jpg", b"x")
    memory.pipe_file("/p/closed/b.jpg", b"x")
    whole = type(memory).ls

    def guarded(self: fsspec.AbstractFileSystem, path: str, detail: bool = True, **rest: object) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return whole(self, path, detail=detail, **rest)

    monkeypatch.setattr(type(memory), "ls", guarded)
    # As file systems that cannot list everything at once.
    monkeypatch.setattr(type(memory), "find", fsspec.AbstractFileSystem.find)
    listing = find_images(["memory://p"])
    assert paths(listing) == ["memory://p/a.jpg", "memory://p/closed"]
    assert listing.unreadable == ("memory://p/closed",)
    with pytest.raises(DataError, match="cannot list memory://p/closed: PermissionError: Permission denied"):
        find_images(["memory://p/closed"])


def test_file_urls_keep_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "p" / "sub").mkdir(parents=True)
    for name in ("p/a.jpg", "p/sub/b.jpg"):
        (tmp_path / name).write_text(name)
    (tmp_path / "p" / "sub" / "loop").symlink_to(tmp_path / "p")
    (tmp_path / "list.txt").write_text(f"file://{tmp_path}/p/a.jpg\n")
    (tmp_path / "s.tar").write_bytes(packed("m.jpg"))
    listing = find_images([f"file://{tmp_path}/p", f"{tmp_path}/p/a.jpg", f"file://{tmp_path}/s.tar"])
    names = ["p/a.jpg", "p/sub/b.jpg", "s.tar::m.jpg"]
    assert paths(listing) == [f"file://{tmp_path}/{name}" for name in names]
    assert listing.duplicates == 1
    assert [read_image(ref) for ref in listing.images] == [b"p/a.jpg", b"p/sub/b.jpg", b"m.jpg"]
    assert paths(find_images([f"file://{tmp_path}/list.txt"])) == [f"file://{tmp_path}/p/a.jpg"]
    url = f"file://{tmp_path}/p/a.jpg"
    assert read_image(ImageRef(url, url)) == b"p/a.jpg"


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("memory://nothing", UsageError, "memory://nothing does not exist"),
        ("memory://p/*.gif", UsageError, "nothing matches the pattern memory://p/[*].gif"),
        ("memory://gone.tar", DataError, "cannot read the archive memory://gone.tar: No such file"),
        ("memory://gone.txt", DataError, "cannot read the list memory://gone.txt: No such file"),
        ("nosuch://p/a.jpg", UsageError, "nosuch://p/a.jpg"),
        ("zip://a.jpg::memory://x.zip", UsageError, "chain of URLs"),
        ("memory://p/{0..999999999}.jpg", UsageError, "999,999,999|1,000,000,000 names"),
        ("file:///no/such/folder", UsageError, "/no/such/folder does not exist"),
    ],
)
def test_what_is_not_there_is_refused(
    memory: fsspec.AbstractFileSystem, source: str, error: type[Exception], message: str
) -> None:
    memory.pipe_file("/p/a.jpg", b"x")
    with pytest.raises(error, match=message):
        find_images([source])


@pytest.mark.parametrize("source", ["gs://bucket/photos", "gs://bucket/a.jpg", "list.txt"])
def test_a_missing_library_is_one_error_that_names_the_package(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "url_to_fs", lacking)
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("gs://bucket/a.jpg\n")
    with pytest.raises(EnvironmentError_, match="pip install gcsfs"):
        find_images([source])


# --- the web -------------------------------------------------------------------------------------------------


def test_web_addresses_are_not_asked_for_until_they_are_read(site: Site, tmp_path: Path) -> None:
    site.files = {"/a.jpg": b"A", "/200/300": b"B"}
    (tmp_path / "list.txt").write_text(f"{site.url}/a.jpg?size=2\n{site.url}/gone.jpg\n")
    listing = find_images([f"{site.url}/200/300", str(tmp_path / "list.txt")])
    assert paths(listing) == [f"{site.url}/200/300", f"{site.url}/a.jpg?size=2", f"{site.url}/gone.jpg"]
    assert not site.asked
    assert [read_image(ref) for ref in listing.images[:2]] == [b"B", b"A"]
    with pytest.raises(ImageError, match="No such file"):
        read_image(listing.images[2])
    assert site.asked["/gone.jpg"] == 1


@pytest.mark.parametrize("status, times", [(503, 2), (429, 3), (500, 1)])
def test_a_busy_server_is_asked_again(site: Site, status: int, times: int) -> None:
    site.files = {"/a.jpg": b"whole"}
    site.busy = {"/a.jpg": (times, status)}
    assert read_remote(f"{site.url}/a.jpg") == b"whole"
    assert site.asked["/a.jpg"] == times + 1


@pytest.mark.parametrize("status", [401, 403, 410])
def test_a_refusal_is_final(site: Site, status: int) -> None:
    site.files = {"/a.jpg": b"whole"}
    site.busy = {"/a.jpg": (9, status)}
    with pytest.raises(RemoteError, match=f"HTTP {status}") as caught:
        read_remote(f"{site.url}/a.jpg?key=secret")
    assert site.asked["/a.jpg"] == 1
    assert "secret" not in str(caught.value)


def test_a_connection_that_dies_is_made_again_and_then_given_up(site: Site) -> None:
    site.files = {"/a.jpg": b"0123456789" * 1000, "/b.jpg": b"0123456789" * 1000}
    site.dies = {"/a.jpg": 2, "/b.jpg": 99}
    assert read_remote(f"{site.url}/a.jpg") == site.files["/a.jpg"]
    assert site.asked["/a.jpg"] == 3
    ref = ImageRef("b", f"{site.url}/b.jpg")
    with pytest.raises(ImageError, match="tried 4 times") as caught:
        read_image(ref)
    assert caught.value.stage == "read"
    assert site.asked["/b.jpg"] == remote_files.TRIES


def test_a_server_that_is_gone_is_a_reason(site: Site) -> None:
    url = f"{site.url}/a.jpg"
    site.server_close()
    with pytest.raises(ImageError, match="tried 4 times"):
        read_image(ImageRef(url, url))


def test_many_threads_read_at_once(site: Site) -> None:
    site.files = {f"/{n}.jpg": bytes([n]) * 5000 for n in range(64)}
    site.dies = {"/7.jpg": 1, "/40.jpg": 1}
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(read_remote, [f"{site.url}/{n}.jpg" for n in range(64)]))
    assert bodies == list(site.files.values())


# --- archives ------------------------------------------------------------------------------------------------

SAMPLES = ("000.jpg", "000.json", "000.cls", "001.png", "001.json", "001.cls")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_remote_archives_hold_inputs(site: Site, memory: fsspec.AbstractFileSystem, mode: str) -> None:
    body = packed(*SAMPLES, mode=mode)
    memory.pipe_file("/s.tar", body)
    site.files = {"/s.tar": body}
    for url in ("memory://s.tar", f"{site.url}/s.tar"):
        listing = find_images([url])
        assert paths(listing) == [f"{url}::000.jpg", f"{url}::001.png"]
        assert listing.ignored == {".json": 2, ".cls": 2}
        assert [read_image(ref) for ref in reversed(listing.images)] == [b"001.png", b"000.jpg"]


def test_a_connection_that_dies_within_an_archive(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "TRIES", 2)
    site.files = {"/s.tgz": packed(*SAMPLES, mode="w:gz"), "/s.tar": packed(*SAMPLES)}
    for name in site.files:
        site.dies[name] = 1
        first, second = find_images([f"{site.url}{name}"]).images
        site.dies[name] = 2
        with pytest.raises(ImageError, match="tried 2 times"):
            read_image(first)
        assert (read_image(second), read_image(first)) == (b"001.png", b"000.jpg")


def test_a_server_without_ranges_is_told(site: Site) -> None:
    site.ranges = False
    site.files = {"/s.tar": packed(*(f"{n}.jpg" for n in range(20)))}
    (ref, *_) = find_images([f"{site.url}/s.tar"]).images
    with pytest.raises(ImageError, match="no HTTP ranges"):
        read_image(ref)


def test_a_remote_file_reads_at_any_position(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/x", bytes(range(100)))
    with io.BufferedReader(RemoteFile("memory://x"), 16) as stream:
        assert stream.read(3) == bytes([0, 1, 2])
        assert stream.seek(-5, io.SEEK_END) == 95
        assert stream.read() == bytes(range(95, 100))
        assert stream.read(1) == b""
        stream.seek(40)
        assert stream.read(30) == bytes(range(40, 70))
    with pytest.raises(RemoteError, match="No such file"):
        RemoteFile("memory://y")


def test_webdataset_shards_by_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in range(9, 12):
        names = [f"{shard}{n:03d}.{end}" for n in range(2) for end in ("jpg", "json", "cls")]
        Path(f"shard-{shard:06d}.tar").write_bytes(packed(*names))
    listing = find_images(["shard-{000009..000011}.tar"])
    assert paths(listing) == [f"shard-{s:06d}.tar::{s}{n:03d}.jpg" for s in range(9, 12) for n in range(2)]
    assert listing.ignored == {".json": 6, ".cls": 6}
    with pytest.raises(UsageError, match="shard-000012.tar does not exist"):
        find_images(["shard-{000011..000012}.tar"])
    Path("a{1,2}.jpg").write_text("named so")
    assert paths(find_images(["a{1,2}.jpg"])) == ["a{1,2}.jpg"]


# --- labelling -----------------------------------------------------------------------------------------------


def test_remote_images_are_labelled_like_local_ones(
    site: Site, toy_clip: Path, photos: Path, tmp_path: Path
) -> None:
    from cliplet.deploy.label import LabelJob, label
    from cliplet.labels import read_errors, read_labels
    from cliplet.plan import TaggerSettings

    files = sorted(photos.glob("*.jpg"))[:5]
    site.files = {f"/{f.name}": f.read_bytes() for f in files}
    dying, flaky = f"/{files[1].name}", f"/{files[2].name}"
    site.dies = {dying: 99, flaky: 1}
    (tmp_path / "list.txt").write_text("".join(f"{site.url}{name}\n" for name in site.files))
    tagger = TaggerSettings(model=f"open_clip:local-dir:{toy_clip}", classes="cat,dog", views="1")
    for source, out in ((str(tmp_path / "list.txt"), "remote"), (f"{photos}/*.jpg", "local")):
        label(LabelJob(sources=(source,), out=tmp_path / out, tagger=tagger, quiet=True, batch_size=1))
    local = {Path(r.path).name: r.scores.tobytes() for r in read_labels(tmp_path / "local")}
    remote = {r.path: r.scores.tobytes() for r in read_labels(tmp_path / "remote")}
    assert remote == {f"{site.url}/{f.name}": local[f.name] for f in files if f"/{f.name}" != dying}
    (error,) = read_errors(tmp_path / "remote")
    assert (error.path, error.stage) == (f"{site.url}{dying}", "read")
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["fingerprint"]["inputs"]
