"""Every kind of image file: the same upright pixels from the fast decoder and PIL; reduced sizes on request."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_d2.data.augment import Box, Plan
from moco_d2.data.decode import EncodedImage
from moco_d2.io.pictures import read_image

RNG = np.random.default_rng(0)


def picture(height: int = 41, width: int = 60) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    small = RNG.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def oriented(number: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(picture(), form, exif=exif)


def with_segment(jpeg: bytes, payload: bytes) -> bytes:
    """Put an APP1 segment in front of a JPEG's others."""
    return jpeg[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


def in_ascii(number: int) -> bytes:
    """An orientation stored as text, which is none."""
    exif = Image.Exif()
    exif[0x010F] = f"{number}"  # the maker, which is text
    return saved(picture(), "JPEG", exif=exif.tobytes().replace(b"\x01\x0f", b"\x01\x12"))


def xmp(number: int) -> bytes:
    text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{number}"/></x:xmpmeta>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def animation() -> bytes:
    return saved(picture().quantize(16), "GIF", save_all=True, append_images=[picture().quantize(16)])


def same(data: bytes) -> None:
    """Check that both ways of reading give the same, and that the header told the size."""
    expected = np.asarray(read_image(io.BytesIO(data)))
    opened = EncodedImage(data)
    assert (opened.height, opened.width) == expected.shape[:2]
    decoded = opened.decode().permute(1, 2, 0).numpy()
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


KINDS = {
    "4:2:0": lambda: saved(picture(), "JPEG", quality=90),
    "4:4:4": lambda: saved(picture(), "JPEG", quality=95, subsampling=0),
    "4:2:2": lambda: saved(picture(), "JPEG", quality=60, subsampling=1),
    "progressive": lambda: saved(picture(), "JPEG", progressive=True),
    "grey JPEG": lambda: saved(picture().convert("L"), "JPEG"),
    "CMYK JPEG": lambda: saved(picture().convert("CMYK"), "JPEG"),
    "one pixel": lambda: saved(picture(1, 1), "JPEG"),
    "two pictures in a JPEG": lambda: saved(picture(), "MPO", save_all=True, append_images=[picture()]),
    "animation": animation,
    "WebP": lambda: saved(picture(), "WEBP", lossless=True),
    "BMP": lambda: saved(picture(), "BMP"),
    "1 bit": lambda: saved(picture().convert("1"), "PNG"),
    **{f"JPEG turned by EXIF {n}": lambda n=n: oriented(n, "JPEG") for n in range(1, 9)},
    **{f"{form} turned by EXIF": lambda form=form: oriented(6, form) for form in ("PNG", "TIFF", "WEBP")},
    "EXIF 0, which is no orientation": lambda: oriented(0, "JPEG"),
    "EXIF 9, which is no orientation": lambda: oriented(9, "JPEG"),
    "EXIF 65, which is no orientation": lambda: oriented(65, "JPEG"),
    "EXIF as text": lambda: in_ascii(6),
    "turned by XMP": lambda: with_segment(saved(picture(), "JPEG"), xmp(6)),
    "turned by EXIF behind XMP": lambda: with_segment(oriented(8, "JPEG"), xmp(1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_pils_to_the_bit(kind: str) -> None:
    same(KINDS[kind]())


def save(kind: str, path: Path) -> Image.Image:
    """Save a picture in a way that naive loaders get wrong; return the 8-bit RGB picture it shows."""
    rgb = picture()
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored rotated by 90 degrees counter-clockwise
        rgb.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        return rgb
    if kind == "grey16":
        grey = np.asarray(rgb.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(path)
        return Image.fromarray(grey).convert("RGB")
    if kind == "palette":
        palette = rgb.quantize(32)
        palette.save(path, transparency=3)
        return palette.convert("RGB")
    image = rgb.convert({"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}[kind])
    image.save(path)
    return image.convert("RGB")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("exif", "png"), ("grey16", "png"), ("palette", "png"), ("grey", "png"), ("cmyk", "tif"), ("alpha", "png")],
)
def test_every_kind_of_file_reads_as_upright_rgb(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    expected = save(kind, path)
    image = read_image(str(path))
    assert image.mode == "RGB" and image.size == expected.size
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    same(path.read_bytes())


@pytest.mark.parametrize("length", [0, 20, 300, 900])
def test_a_truncated_jpeg_is_an_error(length: int) -> None:
    data = saved(picture(), "JPEG")
    assert len(data) > 1000
    with pytest.raises(OSError, match=r"(?i)cannot identify|truncated|broken"):
        EncodedImage(data[:length]).decode()


class Spy(EncodedImage):
    """Tells how an image was decoded."""

    reduced = 1

    def _reduced_crops(self, plans, reduction):  # type: ignore[no-untyped-def]
        self.reduced = reduction
        return super()._reduced_crops(plans, reduction)


@pytest.mark.parametrize(
    ("form", "smallest", "reduction"),
    [("JPEG", 63, 1), ("JPEG", 64, 2), ("JPEG", 127, 2), ("JPEG", 128, 4), ("JPEG", 256, 8), ("PNG", 256, 1)],
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_at_the_size_that_the_smallest_crop_needs(
    form: str, smallest: int, reduction: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth(400, 480), form, quality=95, exif=exif)
    opened = Spy(data, reduced=True)
    boxes = [Box(5, 10, smallest, smallest + 9), Box(21, 30, 300, 320)]
    exact = Spy(data)
    plans = [Plan(box, (), 32) for box in boxes]
    exact.crops(plans)
    assert exact.reduced == 1, "only where it was asked for"
    crops = opened.crops(plans)
    assert opened.reduced == reduction
    whole = read_image(io.BytesIO(data))
    for box, crop in zip(boxes, crops, strict=True):
        part = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        expected = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        difference = np.abs(expected - crop)
        assert difference.mean() < (0.3 if reduction == 1 else 3), "the same place, to a part of a pixel"
