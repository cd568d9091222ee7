"""Any picture becomes upright RGB; anything else one ImageError with a reason."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from nbhd.errors import ArgumentError, FileError
from nbhd.tasks.images import MAX_FILE_BYTES, ImageError, decode_image, is_image, readable_formats
from tests.files import as_ordinary_user
from tests.pictures import BLACK, BLUE, GREEN, RED, WHITE, bombs, corners, distance, encode, noise, png

LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
    "SGI": {},
}
LOSSY = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}, "GIF": {}}
# Pillow warns about the damage we make on purpose before it gives up.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def needs(format: str) -> None:
    if format not in readable_formats() or format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot read and write {format}")


def fails(source: bytes | Path) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(source)
    return caught.value.reason


# Formats


@pytest.mark.parametrize("format", [*LOSSLESS, *LOSSY])
def test_each_format_is_read(format: str) -> None:
    needs(format)
    image = decode_image(encode(corners(), format, **{**LOSSLESS, **LOSSY}[format]))
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert distance(image, corners()) <= (0 if format in LOSSLESS else 12)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind(kind: type) -> None:
    assert distance(decode_image(kind(encode(corners(), "PNG"))), corners()) == 0


def test_bytes_decide_not_the_name(tmp_path: Path) -> None:
    picture, text = tmp_path / "notes.txt", tmp_path / "photo.jpg"
    picture.write_bytes(encode(corners(), "PNG"))
    text.write_text("not a photo")
    assert decode_image(picture).size == (48, 32)
    assert is_image(picture)
    assert fails(text) == "not an image, or not in a format that is read here"
    assert not is_image(text)


@pytest.mark.parametrize(
    "data",
    [
        b"DDS " + bytes(200),
        b"qoif" + bytes(200),
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg/>",
        b"PK\3\4",
        b"\0",
        b"GIF",
    ],
)
def test_other_files_are_not_images(data: bytes) -> None:
    assert "not an image" in fails(data)


def test_random_bytes_are_never_an_image() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        fails(random.bytes(int(random.integers(1, 2000))))


def test_heic_is_named() -> None:
    assert "HEIC" in fails(b"\0\0\0\x18ftypheic" + bytes(100))


# Orientation

STORED = {  # how a picture is stored so that this orientation brings it upright (EXIF 2.32, tag 0x0112)
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(STORED[orientation](corners()), format, exif=exif, **options)
    assert distance(decode_image(data), corners()) < 3


def test_orientation_together_with_a_smaller_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = corners(480, 320)
    data = encode(STORED[6](upright), "JPEG", exif=exif, quality=95)
    image = decode_image(data, min_size=80)
    assert image.size == (120, 80)
    assert distance(image, upright.resize((120, 80))) < 6


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage", bytes(range(200, 240))]
)
def test_a_damaged_exif_block_does_not_cost_the_picture(exif: bytes) -> None:
    assert distance(decode_image(encode(corners(), "JPEG", exif=exif, quality=95)), corners()) < 12


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_outside_the_standard_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert distance(decode_image(encode(corners(), "PNG", exif=exif)), corners()) == 0


# Colours


def test_cmyk_jpeg_as_adobe_inverts_it() -> None:
    data = encode(corners().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in data[:200]
    assert distance(decode_image(data), corners()) < 3


def test_cmyk_jpeg_holds_inverted_ink() -> None:
    """Photoshop stores 255 for no ink; read plainly, white paper would come out black."""
    paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert decode_image(encode(paper, "JPEG", quality=95)).getpixel((8, 8)) == WHITE


def test_cmyk_tiff() -> None:
    assert distance(decode_image(encode(corners().convert("CMYK"), "TIFF")), corners()) == 0


def test_lab_tiff() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(corners(), *profiles, outputMode="LAB")
    assert lab is not None
    # the saturated corners lie at the edge of what 8-bit Lab can say
    assert distance(decode_image(encode(lab, "TIFF")), corners()) < 8


def test_ycbcr_jpeg_is_the_usual_one() -> None:
    assert distance(decode_image(encode(corners().convert("YCbCr"), "JPEG", quality=95, subsampling=0)), corners()) < 3


@pytest.mark.parametrize("mode", ["1", "L"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_greyscale(mode: str, format: str) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (4, 0, 8, 8))
    rgb = decode_image(encode(image.convert(mode), format))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((7, 7))) == (BLACK, WHITE)


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(1, 256)
RAMP8 = np.arange(256, dtype=np.uint8)


def is_ramp(image: Image.Image) -> bool:
    pixels = np.asarray(image).astype(int)
    return pixels.shape == (1, 256, 3) and bool((np.abs(pixels[0] - RAMP8[:, None]) <= 1).all())


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_scaled_not_clipped(format: str) -> None:
    assert is_ramp(decode_image(encode(Image.fromarray(RAMP), format)))


def test_16_bit_greyscale_tiff_of_the_other_byte_order() -> None:
    big = Image.frombytes("I;16B", (256, 1), RAMP.astype(">u2").tobytes())
    assert is_ramp(decode_image(encode(big, "TIFF")))


def test_16_bit_dark_png_stays_dark() -> None:
    assert decode_image(png(2, 1, 16, 0, struct.pack(">HH", 0, 300))).getpixel((1, 0)) == (1, 1, 1)


def test_16_bit_pgm() -> None:
    assert is_ramp(decode_image(b"P5 256 1 65535\n" + RAMP.astype(">u2").tobytes()))


def test_16_bit_colour_png() -> None:
    assert is_ramp(decode_image(png(256, 1, 16, 2, np.repeat(RAMP[0], 3).astype(">u2").tobytes())))


def test_16_bit_colour_png_with_alpha() -> None:
    row = np.stack([RAMP[0]] * 3 + [np.full(256, 65535)], -1).astype(">u2")
    assert is_ramp(decode_image(png(256, 1, 16, 6, row.tobytes())))


@pytest.mark.parametrize("values", [RAMP / 65535.0, RAMP * 1.0, RAMP - 1000.0])
def test_real_numbers_are_scaled(values: np.ndarray) -> None:
    assert is_ramp(decode_image(encode(Image.fromarray(values.astype(np.float32)), "TIFF")))


def test_real_numbers_that_are_none() -> None:
    values = np.array([[np.nan, np.inf, 1.0, 0.0]], np.float32)
    assert np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 0, 255, 0]


def test_32_bit_integers_are_scaled() -> None:
    values = np.linspace(-(2**31), 2**31 - 1, 256).astype(np.int32).reshape(1, 256)
    assert is_ramp(decode_image(encode(Image.fromarray(values), "TIFF")))


# Transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_transparent_pixels_lie_on_white(mode: str, format: str) -> None:
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    rgb = decode_image(encode(image.convert(mode), format))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [BLACK, WHITE, (204, 204, 204)]


def test_palette_with_one_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    rgb = decode_image(encode(image, "PNG", transparency=0))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == (WHITE, GREEN)
    rgb = decode_image(encode(image, "GIF", transparency=0))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == (WHITE, GREEN)


def test_palette_with_an_alpha_for_each_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLACK, *BLUE])
    image.putpixel((1, 0), 1)
    rgb = decode_image(encode(image, "PNG", transparency=b"\x33\xff"))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ((204, 204, 204), BLUE)


def test_palette_without_transparency() -> None:
    assert distance(decode_image(encode(corners().convert("P", palette=Image.Palette.ADAPTIVE), "PNG")), corners()) < 3


def test_one_colour_declared_transparent() -> None:
    rgb = decode_image(encode(corners(), "PNG", transparency=RED))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((40, 0))) == (WHITE, GREEN)


# Animation


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    others = [Image.new("RGB", (48, 32), colour) for colour in (BLUE, BLACK)]
    options = {"WEBP": {"lossless": True}}.get(format, {})
    data = encode(corners(), format, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert distance(decode_image(data), corners()) < 3


# Size


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_large_picture_may_come_back_smaller(format: str) -> None:
    large = noise(32, 24).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(large, format)
    assert decode_image(data).size == (1600, 1200)
    image = decode_image(data, min_size=250)
    assert 250 <= min(image.size) < 500
    assert image.width / image.height == pytest.approx(4 / 3, rel=0.01)
    assert distance(image, large.resize(image.size, Image.Resampling.BOX)) < 3


def test_a_small_picture_is_never_enlarged_or_reduced() -> None:
    assert decode_image(encode(corners(), "JPEG"), min_size=20).size == (48, 32)
    assert decode_image(encode(corners(), "JPEG"), min_size=5000).size == (48, 32)


def test_one_pixel() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), RED), "PNG")).getpixel((0, 0)) == RED


def test_min_size_is_checked() -> None:
    with pytest.raises(ArgumentError, match="min_size must be at least 1, got 0"):
        decode_image(encode(corners(), "PNG"), min_size=0)


@pytest.mark.parametrize("format", bombs())
def test_a_bomb_is_refused_by_its_header(format: str) -> None:
    start = time.monotonic()
    assert "too large" in fails(bombs()[format])
    assert time.monotonic() - start < 2


def test_a_bomb_below_pillows_limit_is_refused_by_ours() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert fails(bombs()["png"]) == "too large: 60000 x 60000 pixels, at most 178,956,970 are decoded"


def test_a_file_too_large_to_be_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "sparse.webp"
    with path.open("wb") as stream:
        stream.write(encode(corners(), "WEBP"))
        stream.truncate(MAX_FILE_BYTES + 1)
    assert "too large: 1,073,741,825 bytes" in fails(path)


# Damage


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "SGI"])
def test_cut_short_at_the_middle(format: str) -> None:
    needs(format)
    data = encode(noise(), format)
    assert "cut short" in fails(data[: len(data) // 2])


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "ICO", "PPM", "ICNS", "SGI"]
)
def test_whatever_happens_to_the_bytes_it_is_an_image_or_an_image_error(format: str) -> None:
    needs(format)
    whole = encode(noise(32, 32), format)
    start = time.monotonic()
    random = np.random.default_rng(1)
    outcomes = set()
    for i in range(120):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 8))):
            # half of the damage hits the header, where it matters most
            place = int(random.integers(min(len(data), 64))) if i % 2 else int(random.integers(len(data)))
            data[place] = int(random.integers(256))
        try:
            assert decode_image(bytes(data)).mode == "RGB"
            outcomes.add("image")
        except ImageError as error:
            assert error.reason
            outcomes.add("error")
    assert "error" in outcomes
    assert time.monotonic() - start < 30  # none of the 120 kept the decoder busy


# Files


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    with pytest.raises(FileError, match=r"none\.jpg: no such file") as caught:
        decode_image(path)
    assert isinstance(caught.value, OSError)
    assert fails(path) == "no such file"


def test_empty_file_and_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert fails(path) == "empty file"
    assert fails(b"") == "no bytes"


def test_a_folder_named_like_a_picture(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    assert fails(tmp_path / "x.jpg") == "is a folder"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(20)
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert fails(tmp_path / "pipe.jpg") == "not a file but a pipe, socket or device"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no local sockets")
def test_a_socket_and_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has a short limit
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        assert fails(Path("s.jpg"))
    assert "device" in fails(Path(os.devnull))


def test_a_broken_link_says_where_it_led(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    assert fails(tmp_path / "link.jpg") == "broken link to gone.jpg"


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert "too many levels" in fails(tmp_path / "a.jpg")


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    path.write_bytes(encode(corners(), "JPEG"))
    path.chmod(0)
    with as_ordinary_user(tmp_path):
        assert fails(path) == "permission denied"


def test_no_file_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    data = encode(noise(), "JPEG")
    good.write_bytes(data)
    bad.write_bytes(data[: len(data) // 2])
    before = len(os.listdir("/proc/self/fd"))
    kept = [decode_image(good) for _ in range(5)]
    for _ in range(5):
        fails(bad)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 5


# For the workers of a data loader


def test_function_result_and_error_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(decode_image)) is decode_image
    image = decode_image(encode(corners(), "PNG"))
    assert distance(pickle.loads(pickle.dumps(image)), image) == 0
    with pytest.raises(ImageError) as caught:
        decode_image("/nowhere/a.jpg")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason, copy.name) == ("/nowhere/a.jpg: no such file", "no such file", "/nowhere/a.jpg")


def test_importing_it_brings_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv[0] = 'nbhd'\n"  # importing nbhd elsewhere brings torch by itself
        "import nbhd.tasks.images, nbhd.tasks.inputs\n"
        "print({'torch', 'transformers', 'typer'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
