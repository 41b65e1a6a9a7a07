"""Files that lie elsewhere, by URL: `s3://bucket/key`, `gs://…`, `https://…`, whatever fsspec knows.

    read_remote("https://example.org/a.jpg")

A URL is kept as it was typed: it names the image in every table. Credentials and endpoints are fsspec's affair: its
libraries read their usual environment variables and files, and `FSSPEC_S3_ENDPOINT_URL` and the like set the rest.
What may pass by itself (a connection that breaks off, a server that is busy) is tried again; what will not (no such
file, no right to read it) is not.

Every function here may be called from many threads at once.
"""

from __future__ import annotations

import io
import os
import posixpath
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from cliplet.errors import EnvironmentError_, UsageError
from cliplet.file_patterns import Found

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
# Times that one read is tried, and the seconds before the second; each further wait is twice as long.
TRIES = 4
FIRST_WAIT_S = 0.5
# Seconds for a connection to be made, and without a byte before a server is held to be gone.
CONNECT_S = 30
SILENCE_S = 60

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_LOCAL = ("file", "local")
_WEB = ("http", "https")
# The package that brings a protocol, where it is not called like it.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(_WEB, "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("github", "webhdfs", "dbfs"), "requests"),
    **dict.fromkeys(("hdfs", "arrow_hdfs"), "pyarrow"),
    "hf": "huggingface_hub",
    "oci": "ocifs",
    "oss": "ossfs",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}
# HTTP's words for "not now"; every status from 500 on is one, too.
_PASSING = (408, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_NETWORK_LIBRARIES = ("aiohttp", "requests", "urllib3", "http", "paramiko")


class RemoteError(OSError):
    """Why a remote file cannot be had, as one sentence."""


class MissingFile(RemoteError):
    """There is no such file."""


def is_remote(name: str) -> bool:
    """Whether a name is a URL rather than a path."""
    return _URL.match(name) is not None


def protocol_of(url: str) -> str:
    """The protocol of a URL, such as `s3`."""
    match = _URL.match(url)
    assert match is not None
    return match[1].lower()


def local_path(name: str) -> str | None:
    """The path that a `file://` URL names; None for any other name."""
    return name.split("://", 1)[1] if is_remote(name) and protocol_of(name) in _LOCAL else None


def is_web(url: str) -> bool:
    """Whether a URL is of the web, where every URL may be a file and only few can be listed."""
    return protocol_of(url) in _WEB


def located(base: str, name: str) -> str:
    """Where an input lies that was named in the folder `base`: URLs are the same from everywhere."""
    return name if is_remote(name) else os.path.join(base, name)


def suffix_of(name: str) -> str:
    """The suffix in lower case, a web address's query left out: `.jpg` of `https://example.org/a.JPG?size=2`."""
    path = urlsplit(name).path if is_remote(name) and is_web(name) else name
    return posixpath.splitext(path)[1].lower()


def check_protocol(url: str) -> None:
    """Raise unless this machine can read URLs of this protocol.

    Raises:
        EnvironmentError_: the library that it needs is missing.
        UsageError: no such protocol.
    """
    _opened(url)


def read_remote(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a remote file: all, or `size` of them from `offset` on (fewer where it ends).

    Raises:
        RemoteError: they cannot be had.
        EnvironmentError_, UsageError: see `check_protocol`.
    """
    filesystem, path = _opened(url)
    if size is None:
        return _retried(lambda: filesystem.cat_file(path))
    if size == 0:
        return b""
    data = _retried(lambda: filesystem.cat_file(path, start=offset, end=offset + size))
    if len(data) > size:
        raise RemoteError("its server sends whole files only (no HTTP ranges); copy the archive here first")
    return data


def find_remote(url: str) -> Found | None:
    """The files in and below a remote folder, or the file itself; hidden ones left out. None: nothing is there.

    Raises:
        RemoteError: it cannot be listed.
        EnvironmentError_, UsageError: see `check_protocol`.
    """
    filesystem, path = _opened(url)
    filesystem.invalidate_cache()
    try:
        if not is_web(url) and _retried(lambda: filesystem.isfile(path)):
            return Found([url], [])
        found = _below(filesystem, path)
    except MissingFile:
        return None
    base = _Base(filesystem, url)
    files = [base.spelled(name) for name in found.files if not base.hides(name) and not name.endswith("/")]
    if not files and not found.unreadable and not _retried(lambda: filesystem.exists(path)):
        return None
    return Found(sorted(files), [base.spelled(name) for name in found.unreadable])


def match_remote(pattern: str) -> Found:
    """The files that a pattern with `*`, `?`, `[` or `**` matches, and those below folders that it matches.

    Raises:
        RemoteError, EnvironmentError_, UsageError: as `find_remote`.
    """
    filesystem, path = _opened(pattern)
    filesystem.invalidate_cache()
    base = _Base(filesystem, _above(pattern))
    files, unreadable = list[str](), list[str]()
    for name, facts in sorted(_retried(lambda: filesystem.glob(path, detail=True)).items()):
        if base.hides(name):
            continue
        if facts["type"] != "directory":
            files.append(base.spelled(name))
            continue
        found = find_remote(base.spelled(name))
        if found is not None:
            files += found.files
            unreadable += found.unreadable
    return Found(sorted(set(files)), unreadable)


def has_pattern(url: str) -> bool:
    """Whether a URL is a pattern. `?` begins the query of a web address, so there it is none."""
    return any(c in url for c in ("*[" if is_web(url) else "*?["))


class RemoteFile(io.RawIOBase):
    """A remote file to read at any position, every read tried again where that may help.

    Raises:
        RemoteError: it is not there, its size is not known, or its server sends whole files only.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        filesystem, path = _opened(url)
        size = _retried(lambda: filesystem.info(path))["size"]
        if size is None:
            raise RemoteError("its server does not tell its size; copy the archive here first")
        self._size = int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        data = read_remote(self._url, self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Base:
    """Names that a file system gives, spelled as the user spelled the folder that they are in."""

    def __init__(self, filesystem: AbstractFileSystem, url: str) -> None:
        self._filesystem = filesystem
        self._url = url.rstrip("/") if url.rstrip("/") != f"{protocol_of(url)}:" else url.rstrip("/") + "/"
        self._path = str(filesystem._strip_protocol(url)).rstrip("/")

    def spelled(self, name: str) -> str:
        if name.startswith(self._path + "/") or name == self._path:
            return self._url + name[len(self._path) :]
        return str(self._filesystem.unstrip_protocol(name))

    def hides(self, name: str) -> bool:
        below = name[len(self._path) :] if name.startswith(self._path) else name
        return any(part.startswith(".") for part in below.split("/"))


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, one for each thread, and the URL's name in it."""
    import fsspec

    protocol = protocol_of(url)
    if "::" in url:
        raise UsageError(f"{url} is a chain of URLs", "one URL", "copy the inner files to one place")
    options: dict[str, Any] = {}
    try:
        if protocol in _WEB and "client_kwargs" not in fsspec.config.conf.get(protocol, {}):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        filesystem, path = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"{protocol} (fsspec says: {error})")
        raise EnvironmentError_(
            f"{protocol}:// cannot be read here: {error}",
            f"the library that fsspec reads {protocol}:// with",
            f"pip install {package}",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{url}: {error}", "a URL that fsspec knows, such as s3://, gs://, https:// or file://"
        ) from error
    return filesystem, path


def _below(filesystem: AbstractFileSystem, path: str) -> Found:
    """All files below a folder, named as the file system names them.

    Object stores list everything at once and know no folders that may not be read. Elsewhere fsspec's own walk
    would skip such folders in silence.
    """
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    own = getattr(type(filesystem), "_find", None) or type(filesystem).find
    if own not in (AsyncFileSystem._find, AbstractFileSystem.find):
        return Found(list(_retried(lambda: filesystem.find(path))), [])
    found = Found([], [])
    folders, seen = [path], set[str]()
    while folders:
        folder = folders.pop()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            entries = _retried(lambda folder=folder: filesystem.ls(folder, detail=True))  # type: ignore[misc]
        except RemoteError:
            if folder == path:
                raise
            found.unreadable.append(folder)
            continue
        for entry in entries:
            (folders if entry["type"] == "directory" else found.files).append(entry["name"])
    return found


def _above(pattern: str) -> str:
    """The folder that a pattern starts from: `s3://bucket/a` of `s3://bucket/a/b*/c`."""
    magic = "*[" if is_web(pattern) else "*?["
    first = min(pattern.index(c) for c in magic if c in pattern)
    return pattern[: pattern.rindex("/", 0, first) + 1]


def _retried(work: Callable[[], T]) -> T:
    """What `work` gives, tried again where that may help.

    Raises:
        RemoteError: no try went well; the last one's reason.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return work()
        except MemoryError:
            raise
        except FileNotFoundError as error:
            raise MissingFile("No such file") from error
        except Exception as error:  # noqa: BLE001  every protocol's library raises its own
            if not _passes(error):
                raise RemoteError(_reason(error)) from error
            if attempt == TRIES:
                raise RemoteError(f"{_reason(error)} (tried {TRIES} times)") from error
        # Threads that failed together shall not come back together.
        time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def _passes(error: Exception) -> bool:
    """Whether another try may end otherwise."""
    status = _status(error)
    if status is not None:
        return status in _PASSING or status >= 500
    if isinstance(error, _FINAL):
        return False
    library = type(error).__module__.partition(".")[0]
    # A wrong address is a ValueError, also where it comes from a library of the network.
    return isinstance(error, OSError | EOFError) or (
        library in _NETWORK_LIBRARIES and not isinstance(error, ValueError)
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and found >= 100 else None


def _reason(error: BaseException) -> str:
    """An error as one sentence; addresses, which may hold keys, are left out."""
    status = _status(error)
    if status is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    message = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
