"""Decoding and reading images: every format, every way to be damaged, and never another exception."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cliplet.errors import DataError, UsageError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, read_image

TOLERANCE = 3  # levels that two JPEG decoders may differ by, with the slow DCT and smooth upsampling


@cache
def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture whose corners all differ."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / max(height - 1, 1), x / max(width - 1, 1)
    return Image.fromarray((np.stack([x, y, (1 - x) * (1 - y)], axis=-1) * 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def decoded(data: bytes, fit: int = 1 << 15) -> Picture:
    return decode_image(data, fit=fit)


def difference(a: np.ndarray, b: np.ndarray | Image.Image) -> int:
    """The largest difference between two arrays of pixels of the same shape."""
    b = np.asarray(b)
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def plain(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# Formats


@pytest.mark.parametrize(
    "format, mode, options, tolerance",
    [
        ("JPEG", "RGB", {}, TOLERANCE),
        ("JPEG", "RGB", {"subsampling": 0}, TOLERANCE),
        ("JPEG", "RGB", {"progressive": True}, TOLERANCE),
        ("JPEG", "RGB", {"keep_rgb": True}, TOLERANCE),
        ("JPEG", "L", {}, TOLERANCE),
        ("JPEG", "CMYK", {"quality": 95}, 0),
        ("PNG", "RGB", {}, 0),
        ("PNG", "L", {}, 0),
        ("PNG", "1", {}, 0),
        ("PNG", "P", {}, 0),
        ("WEBP", "RGB", {"lossless": True}, 0),
        ("GIF", "P", {}, 0),
        ("BMP", "RGB", {}, 0),
        ("TIFF", "RGB", {}, 0),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
        ("TIFF", "RGB", {"compression": "jpeg"}, 0),
        ("TIFF", "CMYK", {}, 0),
        ("PPM", "RGB", {}, 0),
        ("PPM", "L", {}, 0),
        ("MPO", "RGB", {}, TOLERANCE),
    ],
)
def test_every_format_decodes_to_what_plain_pillow_sees(
    format: str, mode: str, options: dict[str, Any], tolerance: int
) -> None:
    data = encoded(photo().convert(mode), format, **options)
    picture = decoded(data)
    assert (picture.width, picture.height) == (96, 64)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.flags.c_contiguous and picture.pixels.flags.writeable
    assert difference(picture.pixels, plain(data)) <= tolerance


def test_cmyk_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK")
    assert difference(decoded(encoded(red, "JPEG", quality=100)).pixels, red.convert("RGB")) <= TOLERANCE


def test_the_first_bytes_tell_the_format() -> None:
    assert decoded(encoded(photo().convert("P"), "GIF")).pixels.shape == (64, 96, 3)  # no name was asked for


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=40, **options)
    assert difference(decoded(data).pixels, frames[0]) <= 1


@pytest.mark.parametrize(
    "image, format, options",
    [
        (Image.new("RGBA", (4, 3), (255, 0, 0, 0)), "PNG", {}),
        (Image.new("LA", (4, 3), (0, 0)), "PNG", {}),
        (Image.new("RGB", (4, 3), (9, 9, 9)), "PNG", {"transparency": (9, 9, 9)}),
        (Image.new("L", (4, 3), 9), "PNG", {"transparency": 9}),
        (Image.new("P", (4, 3), 0), "PNG", {"transparency": 0}),
        (Image.new("P", (4, 3), 0), "PNG", {"transparency": b"\0\xff"}),
        (Image.new("P", (4, 3), 0), "GIF", {"transparency": 0}),
        (Image.new("RGBA", (4, 3), (255, 0, 0, 0)), "WEBP", {"lossless": True, "exact": True}),
        (Image.new("RGBA", (4, 3), (255, 0, 0, 0)), "TIFF", {}),
    ],
)
def test_what_is_transparent_becomes_white(image: Image.Image, format: str, options: dict[str, Any]) -> None:
    assert (decoded(encoded(image, format, **options)).pixels == 255).all()


def test_half_transparent_mixes_with_white() -> None:
    pixels = decoded(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG")).pixels
    assert difference(pixels, np.full((2, 2, 3), (255, 127, 127))) <= 1


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel; `values` uint16 [H,W] gray or [H,W,3] RGB. Pillow writes only the former."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


RAMP = np.linspace(0, 1, 64, dtype=np.float64).reshape(4, 16)


@pytest.mark.parametrize(
    "data",
    [
        png_of_16_bits((RAMP * 65535).astype(np.uint16)),
        png_of_16_bits(np.repeat((RAMP * 65535).astype(np.uint16)[..., None], 3, axis=2)),
        b"P5 16 4 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
        encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
        encoded(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"),
        encoded(Image.fromarray((RAMP * 255).astype(np.int32)), "TIFF"),
        encoded(Image.fromarray((RAMP * 2_000_000 - 1_000_000).astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
        encoded(Image.fromarray((RAMP * 9 - 3).astype(np.float32)), "TIFF"),
    ],
    ids="png16 rgb16 pgm16 tiff16 int16 int8 int float01 float255 float".split(),
)
def test_deep_gray_is_scaled_and_not_clipped(data: bytes) -> None:
    expected = np.repeat(np.rint(RAMP * 255)[..., None], 3, axis=2)
    assert difference(decoded(data).pixels, expected) <= 1


@pytest.mark.parametrize(
    "values", [[[np.nan, 0.0, 1.0]], [[np.nan, np.nan, np.nan]], [[np.inf, -np.inf, 0.5]], [[-3e38, 3e38, 0]]]
)
def test_floats_that_are_no_numbers_do_not_matter(values: list[list[float]]) -> None:
    assert decoded(encoded(Image.fromarray(np.array(values, np.float32)), "TIFF")).pixels.shape == (1, 3, 3)


# Size


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "size, fit, expected",
    [
        ((96, 64), 96, (96, 64)),
        ((96, 64), 1000, (96, 64)),
        ((96, 64), 95, (95, 63)),
        ((96, 64), 48, (48, 32)),
        ((64, 96), 30, (20, 30)),
        ((97, 61), 13, (13, 8)),
        ((1, 1), 1, (1, 1)),
        ((1, 1), 448, (1, 1)),
        ((30_000, 20), 448, (448, 1)),
        ((20, 30_000), 448, (1, 448)),
        ((96, 64), 1, (1, 1)),
    ],
)
def test_the_longer_side_is_shrunk_to_fit(
    format: str, size: tuple[int, int], fit: int, expected: tuple[int, int]
) -> None:
    picture = decoded(encoded(photo(*size), format), fit)
    assert picture.pixels.shape == (expected[1], expected[0], 3)
    assert (picture.width, picture.height) == size


def test_an_image_that_is_little_larger_is_kept() -> None:
    kept, shrunk = (encoded(photo(side, 80), "JPEG") for side in (150, 151))
    assert decode_image(kept, fit=100, keep=150).pixels.shape == (80, 150, 3)
    assert decode_image(shrunk, fit=100, keep=150).pixels.shape == (53, 100, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (133, 100)), ((400, 100), (400, 100)), ((2000, 50), (2000, 50)), ((9000, 90), (2048, 20))],
)
def test_the_shorter_side_keeps_its_room(size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = decode_image(encoded(photo(*size), "JPEG"), fit=120, short=100)
    assert picture.pixels.shape == (expected[1], expected[0], 3)


@pytest.mark.parametrize("fit", [20, 41, 64, 95])
def test_a_shrunk_jpeg_looks_like_pillow_s(fit: int) -> None:
    data = encoded(photo(), "JPEG", quality=95)
    pixels = decoded(data, fit).pixels
    expected = Image.fromarray(plain(data)).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).mean() < 2


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decoded(encoded(Image.fromarray(stripes), "PNG"), 16).pixels
    assert difference(pixels[:, 1:-1], np.full((16, 14, 3), 127)) <= 2


def test_fit_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        decoded(encoded(photo(), "PNG"), 0)


# EXIF


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(format: str, orientation: int) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(photo(), format, exif=exif_with(orientation), **options)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's numbers in Pillow's
    expected = Image.fromarray(plain(encoded(photo(), format, **options)))
    if orientation in turn:
        expected = expected.transpose(Image.Transpose(turn[orientation]))
    picture = decoded(data)
    assert (picture.width, picture.height) == expected.size
    assert picture.pixels.flags.c_contiguous
    assert difference(picture.pixels, expected) <= TOLERANCE
    assert decoded(data, 24).pixels.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))


def jpeg_with_exif(exif: bytes) -> bytes:
    data = encoded(photo(), "JPEG")
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize(
    "exif, turned",
    [
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", True),
        (b"MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", True),  # says 9 entries, holds 1
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0", False),  # orientation 99
        (b"MM\0*\0\0\0\x08\0\x01\x01\x12", False),
        (b"MM\0*\xff\xff\xff\xff", False),
        (b"II*\0\x08\0\0\0\xff\xff" + b"\x9b" * 40, False),
        (b"nonsense", False),
        (b"", False),
    ],
)
def test_malformed_exif_costs_no_image(exif: bytes, turned: bool) -> None:
    assert decoded(jpeg_with_exif(exif)).pixels.shape == ((96, 64, 3) if turned else (64, 96, 3))


# What cannot be decoded


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
JPEG = encoded(photo(), "JPEG", quality=90)
PNG = encoded(photo(), "PNG")


def flawed_scan(data: bytes) -> bytes:
    """A JPEG whose second half of the scan is missing, but which has its end mark."""
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "zero bytes"),
        (b"hello, world\n", "not an image .* text"),
        (b"\n<!DOCTYPE html><html></html>", "not an image .* web page"),
        (b"<svg xmlns='x'/>", "not an image .* SVG"),
        (b"%PDF-1.7", "not an image .* PDF"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "not an image .* HEIC"),
        (b"PK\x03\x04", "not an image .* ZIP"),
        (bytes(100), "not an image .* zeros"),
        (b"\x01\x02\x03\x04\x05", "not an image .*01 02 03 04 05"),
        (JPEG[:2], "not an image"),
        (JPEG[:20], "JPEG"),
        (JPEG[: len(JPEG) // 2], "truncated JPEG"),
        (JPEG[:-40], "truncated JPEG"),
        (flawed_scan(JPEG), "truncated JPEG"),
        (encoded(photo(), "JPEG", progressive=True)[:-200], "truncated JPEG"),
        (flawed_scan(encoded(NOISE, "JPEG", progressive=True)), "truncated JPEG"),
        (JPEG[:700] + b"\xff\xd3" + JPEG[700:], "JPEG"),
        (encoded(photo().convert("CMYK"), "JPEG")[:-200], "truncated JPEG"),
        (PNG[: len(PNG) // 2], "truncated PNG"),
        (PNG[:20], "PNG"),
        (PNG[:60] + b"\x55" * 20 + PNG[80:], "PNG"),
        (encoded(photo(), "WEBP")[:-100], "WEBP"),
        (encoded(photo().convert("P"), "GIF")[:-200], "truncated GIF"),
        (encoded(photo(), "BMP")[:-100], "truncated BMP"),
        (encoded(photo(), "TIFF", compression="tiff_lzw")[:300], "TIFF"),
        (encoded(photo(), "PPM")[:-100], "PPM"),
    ],
)
def test_what_is_no_whole_image_says_why(data: bytes, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decoded(data)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.reason
    assert isinstance(caught.value, DataError)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data",
    [
        JPEG + b"garbage" * 100,
        JPEG + JPEG,
        JPEG[:-2],  # the end mark alone is missing
        JPEG[:-1],
        JPEG[:-2] + bytes(33) + JPEG[-2:],  # padded before the end mark
        JPEG[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x07\x01\x01\x01" + JPEG[2:],
        PNG + b"garbage" * 100,
        encoded(photo(), "JPEG", restart_marker_rows=1),
        PNG[:33] + png_chunk(b"iCCP", b"x\0\0nonsense")[:-1] + b"?" + PNG[33:],  # wrong checksum
        PNG[:33] + png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(5_000_000))) + PNG[33:],
        PNG[:33] + png_chunk(b"acTL", b"\0") + PNG[33:],
        PNG[:33] + png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff") + PNG[33:],
    ],
    ids="garbage twice no-end half-end padded bad-icc png-garbage restarts iccp ztxt actl exif".split(),
)
def test_what_is_whole_but_odd_still_decodes(data: bytes) -> None:
    assert difference(decoded(data).pixels, photo()) < 40
    assert decoded(data, 48).pixels.shape == (32, 48, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_too_many_pixels_are_refused_from_the_header(format: str) -> None:
    data = encoded(Image.new("L" if format in ("PPM", "JPEG") else "P", (100, 90)).convert("RGB"), format)
    with pytest.raises(ImageError, match="decompression bomb: 9,000 pixels, at most 8,999.*--max-pixels"):
        decode_image(data, fit=10, max_pixels=8999)
    assert decode_image(data, fit=10, max_pixels=9000).pixels.shape == (9, 10, 3)


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_bomb_is_refused_without_a_warning(side: int) -> None:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ImageError, match="decompression bomb"):
        warnings.simplefilter("always")
        decode_image(header, fit=10, max_pixels=10_000 * 10_000)
    assert not seen


def test_the_limit_can_be_raised_beyond_pillow_s() -> None:
    data = encoded(Image.new("1", (20_000, 9_000)), "PNG")
    with pytest.raises(ImageError, match="180,000,000"):
        decode_image(data, fit=8)
    header = data[:33]  # the pixels themselves would take half a gigabyte
    with pytest.raises(ImageError, match="truncated"):
        decode_image(header, fit=8, max_pixels=200_000_000)


@pytest.mark.parametrize(
    "exif", [b"MM\0*\0\0\0\x08\0\x02\x01\x0f\0\x02\0\0\xff\xff\0\0\xff\xff", b"II*\0\xff"]
)
def test_pillow_s_warnings_stay_inside(exif: bytes) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoded(jpeg_with_exif(exif))
    assert not seen


def test_an_image_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("decode", "zero bytes")))
    assert (error.stage, error.reason, str(error)) == ("decode", "zero bytes", "zero bytes")


SEEDS = {
    "jpeg": JPEG,
    "progressive": encoded(photo(), "JPEG", progressive=True),
    "png": PNG,
    "webp": encoded(photo(), "WEBP"),
    "gif": encoded(photo().convert("P"), "GIF"),
    "tiff": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "bmp": encoded(photo(), "BMP"),
    "ppm": encoded(photo(), "PPM"),
}


@pytest.mark.parametrize("seed", SEEDS)
@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    early=st.booleans(),
    kept=st.floats(0, 1),
    fit=st.sampled_from([16, 96]),
)
def test_damaged_bytes_decode_or_raise_image_error(
    seed: str, changes: list[tuple[float, int]], early: bool, kept: float, fit: int
) -> None:
    data = bytearray(SEEDS[seed])
    for where, value in changes:
        data[int(where * (min(len(data), 400) if early else len(data)))] = value
    try:
        picture = decode_image(bytes(data[: int(len(data) * max(kept, 0.05))]), fit=fit, max_pixels=1_000_000)
    except ImageError as error:
        assert error.stage == "decode" and error.reason
    else:
        height, width, channels = picture.pixels.shape
        assert channels == 3 and max(height, width) == min(fit, max(picture.width, picture.height))
        assert picture.pixels.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, len(JPEG) - 3))
def test_no_truncated_jpeg_decodes_to_something_else(kept: int) -> None:
    try:
        pixels = decoded(JPEG[:kept]).pixels
    except ImageError:
        return
    assert difference(pixels, decoded(JPEG).pixels) == 0


def test_many_threads_decode_the_same_pixels() -> None:
    work = [*SEEDS.values(), jpeg_with_exif(b"MM\0*\xff\xff\xff\xff")] * 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decoded, work))
    assert all(
        difference(a.pixels, decoded(data).pixels) == 0 for a, data in zip(together, work, strict=True)
    )


# Reading


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"123")
    assert read_image(ImageRef("a.jpg", str(tmp_path / "a.jpg"))) == b"123"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.jpg", "No such file"),
        ("folder.jpg", "a folder, not a file"),
        ("pipe.jpg", "not a regular file"),
        ("loop.jpg", "symbolic links"),
        ("a\0b.jpg", "null"),
        ("x" * 300, "too long"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(ImageRef(name, f"{tmp_path}/{name}"))
    assert caught.value.stage == "read"


def test_an_archive_that_shrank_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(100))
    with pytest.raises(ImageError, match="ends 50 bytes too early"):
        read_image(ImageRef("a.tar::x.jpg", str(tmp_path / "a.tar"), "x.jpg", offset=50, size=100))
