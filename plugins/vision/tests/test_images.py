"""Images as users give them become RGB; what is none is refused."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image
from qeff_proxy.errors import UsageError
from qeff_proxy_vision.images import open_image

RED = (255, 0, 0)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image, at=(0, 0)):
    return image.getpixel(at)


def test_a_path_bytes_a_pil_image_and_an_array_give_the_same(tmp_path):
    image = Image.new("RGB", (4, 3), RED)
    path = tmp_path / "red.png"
    path.write_bytes(encoded(image))
    sources = [path, str(path), encoded(image), image, np.asarray(image)]
    assert [np.asarray(open_image(source)).tolist() for source in sources] == [
        np.asarray(image).tolist()
    ] * 5


def test_a_url_is_fetched():
    data = encoded(Image.new("RGB", (4, 3), RED))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/red.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert open_image(f"{address}/red.png").size == (4, 3)
        with pytest.raises(UsageError, match="cannot be fetched"):
            open_image(f"{address}/none.png")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_cameras_rotation_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn, clockwise
    turned = open_image(encoded(image, "PNG", exif=exif))
    assert turned.size == (2, 4)
    assert pixel(turned, (1, 0)) == RED


def test_transparency_is_laid_on_white():
    assert pixel(open_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(open_image(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)


def test_a_palette_with_and_without_transparency():
    palette = Image.new("RGB", (2, 2), RED).quantize(2)
    assert pixel(open_image(encoded(palette))) == RED
    transparent = encoded(palette, transparency=palette.getpixel((0, 0)))
    assert pixel(open_image(transparent)) == (255, 255, 255)


def test_grey_black_and_white_and_cmyk():
    assert pixel(open_image(Image.new("L", (2, 2), 100))) == (100, 100, 100)
    assert pixel(open_image(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(open_image(Image.new("CMYK", (2, 2), (0, 255, 255, 0)))) == RED


def test_sixteen_bits_become_eight_by_their_high_byte():
    samples = np.full((2, 2), 0x8080, np.uint16)
    assert pixel(open_image(encoded(Image.fromarray(samples)))) == (0x80,) * 3
    assert pixel(open_image(samples)) == (0x80,) * 3


@pytest.mark.parametrize(
    "array",
    [
        np.full((3, 4, 3), 255, np.uint8),
        np.full((3, 4, 3), 1.0),
        np.full((3, 4, 1), 255, np.uint8),
        np.full((3, 4), 255, np.int64),
    ],
    ids=["uint8", "floats", "one channel", "int64"],
)
def test_arrays_of_several_layouts_and_dtypes(array):
    image = open_image(array)
    assert image.size == (4, 3)
    assert pixel(image) == (255, 255, 255)


def test_channels_may_come_first():
    array = np.zeros((3, 5, 7), np.uint8)
    array[0] = 255
    image = open_image(array)
    assert image.size == (7, 5)
    assert pixel(image) == RED


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "shape"),
        (np.zeros((5, 5, 2), np.uint8), "shape"),
        (np.full((2, 2), 1.5), "0 to 1"),
        (np.full((2, 2), np.nan), "0 to 1"),
        (np.full((2, 2), 256), "int64"),
        (np.full((2, 2), 1j), "complex128"),
        (np.zeros((0, 4), np.uint8), "0 pixels"),
    ],
)
def test_arrays_that_are_no_image(array, reason):
    with pytest.raises(UsageError, match=reason):
        open_image(array)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_an_image_that_shows_nothing(size):
    with pytest.raises(UsageError, match="2 x 2"):
        open_image(Image.new("RGB", size))


def png_that_claims(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 10_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size):
    with pytest.raises(UsageError, match=r"too large|more than"):
        open_image(png_that_claims(*size))


def test_damaged_files(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(UsageError, match="damaged"):
        open_image(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="no image that can be read"):
        open_image(b"not an image")
    with pytest.raises(UsageError, match="no image that can be read"):
        open_image(b"")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(UsageError, match=r"text\.png"):
        open_image(text)


def test_an_image_that_would_start_another_program():
    with pytest.raises(UsageError, match="no image that can be read"):
        open_image(encoded(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_damage_anywhere_gives_an_image_or_a_clear_error(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in {"GIF", "BMP"} else {"exif": exif}
    whole = encoded(Image.effect_noise((20, 30), 50).convert("RGB"), kind, **options)
    generator = np.random.default_rng(0)
    refused = []
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(0, 256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except UsageError as error:
            refused.append(str(error))
    assert all("\n" not in message for message in refused)


def test_what_is_no_source():
    with pytest.raises(UsageError, match="there is no image file"):
        open_image("no/such/file.png")
    with pytest.raises(UsageError, match="cannot be a"):
        open_image(5)


def test_a_flipped_byte_and_an_image_that_is_not_read_yet_are_seen(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    good = encoded(Image.fromarray(noise))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    with pytest.raises(UsageError, match="the image is damaged"):
        open_image(bytes(flipped))
    path = tmp_path / "cut.png"
    path.write_bytes(good[: len(good) // 2])
    with Image.open(path) as image, pytest.raises(UsageError, match="the image is damaged"):
        open_image(image)
