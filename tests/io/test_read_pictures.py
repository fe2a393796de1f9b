"""The one reader of pictures: every mode and format at full range, one limit, and errors that name the file."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from moco_d2.convert.prove import read_picture
from moco_d2.data.decode import EncodedImage
from moco_d2.detection.mapper import read_pixels
from moco_d2.io.pictures import PictureError, picture_size, read_image

HEIGHT, WIDTH = 24, 40
SIXTEEN = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 65535 // (HEIGHT * WIDTH - 1)
BARS = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def bars() -> Image.Image:
    """Black, white and three colours, eight pixels each."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for number, colour in enumerate(BARS):
        image.paste(colour, (8 * number, 0, 8 * number + 8, HEIGHT))
    return image


def grey() -> Image.Image:
    """All levels from 0 to 255, rising."""
    return Image.fromarray((SIXTEEN >> 8).astype(np.uint8))


def black_and_white() -> Image.Image:
    return bars().convert("L").point(lambda level: 255 * (level > 250))


def raw(order: str, values: np.ndarray = SIXTEEN) -> Image.Image:
    return Image.fromarray(values.astype(order))


def pnm(magic: str, largest: int, values: np.ndarray) -> bytes:
    order = "u1" if largest < 256 else ">u2"
    return f"{magic} {WIDTH} {HEIGHT} {largest}\n".encode() + values.astype(order).tobytes()


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def see_through(mode: str) -> Image.Image:
    image = bars().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def png16(channels: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL does not write."""
    import cv2

    return bytes(cv2.imencode(".png", np.repeat(values[..., None], channels, 2).astype(np.uint16))[1].tobytes())


# What is written, and what has to be seen of it.
KINDS: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image]]] = {
    "RGB PNG": (lambda: saved(bars(), "PNG"), bars),
    "RGB BMP": (lambda: saved(bars(), "BMP"), bars),
    "RGB TIFF": (lambda: saved(bars(), "TIFF", compression="tiff_lzw"), bars),
    "RGB WebP": (lambda: saved(bars(), "WEBP", lossless=True), bars),
    "RGB JPEG 2000": (lambda: saved(bars(), "JPEG2000", irreversible=False), bars),
    "RGB PPM": (lambda: saved(bars(), "PPM"), bars),
    "RGBX TIFF": (lambda: saved(bars().convert("RGBX"), "TIFF"), bars),
    "RGBA PNG": (lambda: saved(see_through("RGBA"), "PNG"), bars),
    "RGBA TIFF": (lambda: saved(see_through("RGBA"), "TIFF"), bars),
    "RGB PNG with a transparent colour": (lambda: saved(bars(), "PNG", transparency=(255, 0, 0)), bars),
    "LA PNG": (lambda: saved(see_through("LA"), "PNG"), lambda: bars().convert("L")),
    "L PNG": (lambda: saved(grey(), "PNG"), grey),
    "L PNG with a transparent level": (lambda: saved(grey(), "PNG", transparency=7), grey),
    "L TIFF": (lambda: saved(grey(), "TIFF"), grey),
    "L TIFF, white at 0": (lambda: saved(grey(), "TIFF", tiffinfo={262: 0}), grey),  # PIL's writer turns it over
    "1 PNG": (lambda: saved(black_and_white().convert("1"), "PNG"), black_and_white),
    "1 TIFF": (lambda: saved(black_and_white().convert("1"), "TIFF", compression="group4"), black_and_white),
    "P PNG": (lambda: saved(bars().quantize(16), "PNG"), bars),
    "P PNG, one transparent": (lambda: saved(bars().quantize(16), "PNG", transparency=1), bars),
    "P PNG, many transparent": (lambda: saved(bars().quantize(16), "PNG", transparency=bytes([0, 9, 200])), bars),
    "P GIF": (lambda: saved(bars().quantize(16), "GIF"), bars),
    "PA TIFF": (lambda: saved(see_through("RGBA").convert("PA", colors=16), "TIFF"), bars),
    "CMYK TIFF": (lambda: saved(bars().convert("CMYK"), "TIFF"), bars),
    "16-bit PNG": (lambda: saved(raw("<u2"), "PNG"), grey),
    "16-bit TIFF": (lambda: saved(raw("<u2"), "TIFF"), grey),
    "16-bit TIFF, big-endian": (lambda: saved(raw(">u2"), "TIFF"), grey),
    "16-bit TIFF, packed": (lambda: saved(raw(">u2"), "TIFF", compression="tiff_deflate"), grey),
    "16-bit TIFF, white at 0": (lambda: saved(raw("<u2"), "TIFF", tiffinfo={262: 0}),
                                lambda: grey().point(lambda v: 255 - v)),
    "16-bit JPEG 2000": (lambda: saved(raw("<u2"), "JPEG2000", irreversible=False), grey),
    "16-bit RGB PNG": (lambda: png16(3, SIXTEEN), grey),
    "PGM of 65535": (lambda: pnm("P5", 65535, SIXTEEN), grey),
    "PGM of 255": (lambda: pnm("P5", 255, SIXTEEN >> 8), grey),
    "PGM of 15": (lambda: pnm("P5", 15, SIXTEEN >> 12), lambda: grey().point(lambda v: (v >> 4) * 17)),
    "PPM of 65535": (lambda: pnm("P6", 65535, np.repeat(SIXTEEN // 257 * 257, 3)),
                     lambda: Image.fromarray((SIXTEEN // 257).astype(np.uint8))),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_see_the_same_from_black_to_white(kind: str, tmp_path: Path) -> None:
    data, expected = KINDS[kind][0](), np.asarray(KINDS[kind][1]().convert("RGB"))
    assert (expected.min(), expected.max()) == (0, 255)
    path = tmp_path / "picture.any"
    path.write_bytes(data)
    pretraining = EncodedImage(data).decode().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pretraining, expected)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)
    np.testing.assert_array_equal(read_pixels(str(path), "RGB"), expected)
    np.testing.assert_array_equal(read_pixels(str(path), "BGR")[:, :, ::-1], expected)
    assert picture_size(path) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_stages_turn_pictures_alike(form: str, orientation: int, tmp_path: Path) -> None:
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # PIL's numbers of the turn that undoes each orientation
    stored = bars()
    stored.paste((9, 99, 199), (0, 0, 16, 16))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, form, exif=exif, **options)
    turn = turns[orientation]
    plain = Image.open(io.BytesIO(saved(stored, form, **options))).convert("RGB")
    expected = np.asarray(plain if turn is None else plain.transpose(Image.Transpose(turn)))
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert picture_size(path) == (expected.shape[1], expected.shape[0])
    for seen in (EncodedImage(data).decode().permute(1, 2, 0).numpy(), read_pixels(str(path), "RGB")):
        np.testing.assert_array_equal(seen, expected)


def test_exif_that_nobody_can_read_leaves_a_picture_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(bars(), "JPEG", exif=b"Exif\0\0no TIFF header"))
    assert picture_size(path) == read_image(path).size == (WIDTH, HEIGHT)
    assert EncodedImage(path.read_bytes()).decode().shape == (3, HEIGHT, WIDTH)


def test_a_dark_picture_of_a_16_bit_set_has_the_scale_of_the_others(tmp_path: Path) -> None:
    raw("<u2", SIXTEEN // 300).save(tmp_path / "dark.png")  # nothing above 218: in 16 bits that is black
    assert np.asarray(read_image(tmp_path / "dark.png")).max() == 0


REFUSED = {
    "float TIFF": lambda: saved(raw("<f4"), "TIFF"),
    "32-bit TIFF": lambda: saved(raw("<i4"), "TIFF"),
    "signed 16-bit TIFF": lambda: saved(raw("<u2"), "TIFF", tiffinfo={339: 2}),
    "signed 8-bit TIFF": lambda: saved(grey(), "TIFF", tiffinfo={339: 2}),
    "LAB TIFF": lambda: saved(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF"),
    "float PFM": lambda: f"Pf\n{WIDTH} {HEIGHT}\n-1.0\n".encode() + SIXTEEN.astype("<f4").tobytes(),
    "PostScript, which Ghostscript would run": lambda: saved(bars(), "EPS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_certain_black_and_white_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(REFUSED[kind]())
    for read in (read_image, lambda file: read_pixels(str(file), "BGR"), read_picture):
        with pytest.raises(ValueError, match=r"picture\.tif: .*\w+ picture of mode .*save it") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="save it"):
        EncodedImage(path.read_bytes())


def flood(form: str) -> bytes:
    return saved(Image.new("1" if form == "PNG" else "RGB", (400, 300)), form)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "JPEG", "TIFF"])
def test_the_limit_is_the_keys_and_not_pils(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # warnings are errors here: neither may come
    path = tmp_path / "large"
    path.write_bytes(flood(form))
    assert read_image(path, 120_000).size == picture_size(path) == (400, 300)
    assert EncodedImage(path.read_bytes(), 120_000).decode().shape == (3, 300, 400)
    assert read_pixels(str(path), "RGB", 120_000).shape == (300, 400, 3)
    for read in (read_image, lambda file, most: read_pixels(str(file), "RGB", most)):
        with pytest.raises(PictureError, match=r"large: 400 x 300 pixels are more than DATA.MAX_PIXELS 119999; raise"):
            read(path, 119_999)
    assert Image.MAX_IMAGE_PIXELS == 1000, "PIL's own limit is as it was"


def test_pils_limit_outlives_readers_that_overlap(tmp_path: Path) -> None:
    before, path = Image.MAX_IMAGE_PIXELS, tmp_path / "a.png"
    path.write_bytes(flood("PNG"))
    threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS is not None


class Broken(Dataset[object]):
    """Reads one file, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        return read_image(self.path)


def test_an_error_is_one_line_that_names_the_file_behind_workers_and_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "PictureError: odd.jpg"  # the name in the message is no trap
    path.write_bytes(saved(bars(), "JPEG")[:200])
    said = []
    for workers in (0, 1):
        with pytest.raises(PictureError) as caught:
            next(iter(DataLoader(Broken(path), num_workers=workers)))
        said.append(str(caught.value))
    assert "\n" not in said[0] and said[0].startswith(str(path)) and "repair the file" in said[0]
    assert said[1] == said[0] == str(pickle.loads(pickle.dumps(caught.value)))
