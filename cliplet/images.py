"""One image: from where it lies to its bytes, from its bytes to pixels, or a sentence that says why not.

    ref = find_images(["photos"]).images[0]
    picture = decode_image(read_image(ref), fit=448)

Formats are told apart by their first bytes, never by a file's name. JPEG in gray or RGB goes through
libjpeg-turbo, everything else through Pillow's readers of the formats below; Pillow's other readers, some of
which start programs, are never reached. Colour profiles are not applied.

Every function here may be called from many threads at once.

Legend: H, W pixels of the picture as it is displayed.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cliplet.archives import read_archive
from cliplet.errors import DataError, UsageError
from cliplet.listing import ImageRef, Listing, find_images
from cliplet.remote_files import is_remote, local_path, read_remote

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "ImageRef",
    "Listing",
    "Picture",
    "decode_image",
    "find_images",
    "read_image",
]

LONGEST_SIDE = 2048  # of a panorama whose shorter side wants more room
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; where Pillow, too, stops by itself

_READERS: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"P[1-6]\s"), PpmImageFile),
)
_OTHER_FILES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE), "a web page"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg", re.IGNORECASE), "an SVG drawing"),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(heic|heix|hevc|heim|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL), "JPEG 2000"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"\0+\Z"), "nothing but zeros"),
    (re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z"), "text"),
)
# What Pillow's readers raise when they are fed damaged bytes; MemoryError among them, because a header can
# ask for any amount.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
)
_PILLOW_REMARKS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ORIENTATION_TAG = 0x0112
# The DCT's own scaling is fast but not Pillow's filter: at 1, photographs shrunk from 640 to 224 differ from a
# resize of the full image by 3 levels in the mean and take 0.6 of the time; at 2, by 0.8 levels and 0.9.
_DCT_MARGIN = 2.0


class ImageError(DataError):
    """Why one image has no pixels.

    Attributes:
        stage: `read` (its bytes could not be had) or `decode` (they are not a whole image).
        reason: one sentence for the person whose image it is.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.stage, self.reason)  # so that a worker process can send it home


@dataclass(frozen=True)
class Picture:
    """The pixels of one image.

    Attributes:
        pixels: uint8 [H,W,3] RGB, C-contiguous and writable, at most as large as was asked for.
        width, height: pixels of the full image as it is displayed (after EXIF rotation).
    """

    pixels: np.ndarray
    width: int
    height: int


@dataclass(frozen=True)
class _Room:
    """How large an image may be: its longer side at most `fit`, its shorter not below `short`.

    One whose longer side is at most `keep` stays as it is.
    """

    fit: int
    short: int
    keep: int

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Width and height shrunk to this room, aspect kept, neither below 1."""
        shorter, longer = sorted((width, height))
        wanted = max(self.fit, round(self.short * longer / shorter))
        limit = min(wanted, max(self.fit, LONGEST_SIDE))
        if longer <= max(limit, self.keep):
            return width, height
        return max(1, round(width * limit / longer)), max(1, round(height * limit / longer))


def read_image(ref: ImageRef) -> bytes:
    """The bytes of an input, as they lie in its file or archive, here or remote.

    Raises:
        ImageError: they cannot be read.
        EnvironmentError_: the library for its remote place is missing.
    """
    try:
        if ref.member is not None:
            return _read_member(ref)
        if is_remote(ref.file) and local_path(ref.file) is None:
            return read_remote(ref.file)
        return _read_file(local_path(ref.file) or ref.file)
    except (OSError, EOFError, zlib.error, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory to read it"
        raise ImageError("read", reason) from error


def decode_image(
    data: bytes, *, fit: int, short: int = 0, keep: int = 0, max_pixels: int = MAX_PIXELS
) -> Picture:
    """The pixels of an encoded image, upright, shrunk so that the longer side is at most `fit`.

    The shorter side is not shrunk below `short`, at the price of a longer side beyond `fit`; a panorama ends at
    `LONGEST_SIDE` all the same. An image whose longer side is at most `keep` is not shrunk at all.

    An image that fits already keeps its exact pixels. Transparency is laid over white; of an animation the
    first frame is taken; gray deeper than 8 bits is scaled to 8.

    Raises:
        ImageError: the bytes are not a whole image of a known format, or more pixels than `max_pixels`.
            Of TIFF and WebP, Pillow itself reads at most 178,956,970 pixels.
        UsageError: `fit` is less than 1.
    """
    if fit < 1:
        raise UsageError(f"fit is {fit}", "at least 1 pixel")
    reader = _reader(data)
    _mute_pillow()
    try:
        return _decode(reader, data, _Room(fit, short, keep), max_pixels)
    except Image.DecompressionBombError as error:
        raise ImageError("decode", f"decompression bomb: {error}") from error
    except _DECODER_ERRORS as error:
        essential = _essential_png(data) if reader is PngImageFile else data
        if essential != data:
            return decode_image(essential, fit=fit, short=short, keep=keep, max_pixels=max_pixels)
        raise ImageError("decode", _explained(error, str(reader.format))) from error


def _decode(reader: type[ImageFile], data: bytes, room: _Room, max_pixels: int) -> Picture:
    image = reader(io.BytesIO(data))  # parses the header alone
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "decode",
            f"decompression bomb: {width * height:,} pixels, at most {max_pixels:,} (raise with --max-pixels and --retry-failed)",
        )
    if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB"):
        pixels = _jpeg_pixels(data, image, room)
    else:
        pixels = _shrunk(_rgb(image), room.fitted(*image.size))
        width, height = image.size
    # Pillow turns a TIFF while it loads it.
    orientation = 1 if isinstance(image, TiffImageFile) else _orientation(image.info.get("exif", b""))
    if orientation >= 5:
        width, height = height, width
    return Picture(_turned(pixels, orientation), width, height)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image, uint8 [H,W,3] RGB: turned as its EXIF data says, transparency over white."""
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    pixels = np.array(_rgb(image))
    return _turned(pixels, orientation if orientation in range(1, 9) else 1)


# Reading


def _read_file(file: str) -> bytes:
    mode = os.stat(file).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(file).close()  # of a folder that cannot be listed, the system says why
        raise ImageError("read", "a folder, not a file")
    if not stat.S_ISREG(mode):
        raise ImageError("read", "not a regular file")  # a pipe would keep the reader waiting forever
    with open(file, "rb") as stream:
        return stream.read()


def _read_member(ref: ImageRef) -> bytes:
    if ref.offset < 0:
        raise ImageError("read", "a link to something that is not in the archive")
    data = read_archive(ref.file, ref.offset, ref.size, compressed=ref.compressed)
    if len(data) < ref.size:
        raise ImageError("read", f"the archive ends {ref.size - len(data):,} bytes too early")
    return data


# Decoding


def _reader(data: bytes) -> type[ImageFile]:
    if not data:
        raise ImageError("decode", "zero bytes")
    for magic, reader in _READERS:
        if magic.match(data):
            return reader
    head = data[:512]
    for magic, name in _OTHER_FILES:
        if magic.match(head):
            raise ImageError("decode", f"not an image that can be decoded (looks like {name})")
    raise ImageError("decode", f"not an image that can be decoded (starts with {head[:8].hex(' ')})")


def _mute_pillow() -> None:
    """Keep Pillow's remarks about odd files off stderr: what matters in them is raised and recorded.

    `warnings.catch_warnings` would restore what other threads changed meanwhile. This only ever adds one
    filter; it is looked for each time because others, test runners among them, restore their own list.
    """
    if _PILLOW_REMARKS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _jpeg_pixels(data: bytes, header: JpegImageFile, room: _Room) -> np.ndarray:
    """The pixels of a gray or RGB JPEG as stored, shrunk to its room; [height, width, 3].

    libjpeg goes on after damage and only warns, so warnings are errors here. Those that leave the pixels
    whole (stray bytes after a scan, a bad colour profile, headers that some phones write) get a second
    chance with Pillow, which still refuses a file that ends too early.
    """
    size = room.fitted(*header.size)
    # Scaling inside the DCT is nearly free: take the smallest of its sizes that is not yet too small.
    longer = "min_width" if header.width >= header.height else "min_height"
    smallest = {longer: round(max(size) * _DCT_MARGIN)} if size != header.size else {}
    try:
        return _shrunk(simplejpeg.decode_jpeg(data, "RGB", **smallest), size)
    except ValueError as error:
        remark = str(error)
    if remark.startswith("Premature end") and "progressive" not in header.info:
        # Perhaps the end mark alone is missing. (A progressive file would decode too, but blurred.)
        try:
            return _shrunk(simplejpeg.decode_jpeg(data + b"\xff\xd9", "RGB", **smallest), size)
        except ValueError:
            raise ImageError("decode", "truncated JPEG: the file ends too early") from None
    if remark.startswith("Corrupt JPEG data") and not re.search("extraneous bytes|ICC", remark):
        what = remark.partition(": ")[2]
        kind = "truncated" if "premature end" in what else "damaged"
        raise ImageError("decode", f"{kind} JPEG: {what}")
    return _shrunk(header.convert("RGB"), size)


def _essential_png(data: bytes) -> bytes:
    """The PNG without what its pixels can do without: profiles, texts and dates, one of which may be bad."""
    kept, position = [data[:8]], 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits as uint8 [H,W]."""
    with np.errstate(invalid="ignore"):  # floats may hold any bits
        values = np.asarray(image).astype(np.float64)
    low, high = _value_range(values, image)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def _value_range(values: np.ndarray, image: Image.Image) -> tuple[float, float]:
    """The values that mean black and white.

    16-bit formats say so. Others leave it open: then the first usual range that holds all values (0 to 1 for
    floats, 0 to 255, 0 to 65,535), or else the darkest and the brightest value.
    """
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 0.0, 65535.0
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    if low >= 0:
        for white in usual:
            if high <= white:
                return 0.0, white
    return low, max(high, low + 1.0)


def _shrunk(image: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels uint8 [height, width, 3] of an RGB image at `size` (width, height)."""
    if isinstance(image, np.ndarray):
        if image.shape[1::-1] == size:
            return image
        image = Image.fromarray(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(image)


def _orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is none or the EXIF data cannot be read.

    Read here because Pillow's parser wants the whole block to be in order, and this is the one entry needed.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # cut short before the entry
    return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as stored, [height, width, 3], turned and mirrored to how they are displayed."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _explained(error: BaseException, name: str) -> str:
    """A decoder's exception as one sentence about a file of the format `name`."""
    message = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return f"not enough memory to decode this {name}"
    if isinstance(error, EOFError) or re.search("truncat|unexpected end|requires a buffer", message, re.I):
        return f"truncated {name}: the file ends too early"
    if " " not in message:  # a key or an index, which means nothing to who has only the image
        message = "its parts contradict each other"
    return f"damaged {name}: {message}"
