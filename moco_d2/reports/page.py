"""The HTML of pages of pictures: a self-contained folder with ``index.html`` and ``pictures/``."""

from __future__ import annotations

import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from moco_d2.io.files import atomic_write

_WIDTH = 1000  # maximum width of a drawing in pixels

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin-bottom: 2rem; } th, td { padding: .2rem .9rem .2rem 0; text-align: left; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .6rem; margin-bottom: 1.4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .8rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
"""


def figure(folder: Path, name: str, drawing: np.ndarray, caption: str, kind: str = "jpg", width: int = _WIDTH) -> str:
    """Write a drawing, and return the HTML that shows it.

    Args:
        folder: of the page.
        name: of the file in ``pictures/``, without extension.
        drawing: (H, W, 3) uint8.
        caption: below it; plain text.
        kind: ``jpg`` or ``png``.
        width: greatest width and height in pixels; a larger drawing is scaled down.
    """
    image, buffer = Image.fromarray(drawing), io.BytesIO()
    image.thumbnail((width, width))
    image.save(buffer, {"jpg": "JPEG", "png": "PNG"}[kind], quality=90)
    file_name = f"pictures/{name}.{kind}"
    with atomic_write(folder / file_name) as file:
        file.write(buffer.getvalue())
    size = f'width="{image.width}" height="{image.height}"'
    text = html.escape(caption)
    picture = f'<a href="{file_name}"><img src="{file_name}" {size} alt="{text}" loading="lazy"></a>'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def write_page(folder: Path, title: str, body: str) -> Path:
    """Write ``index.html``, and return its path.

    Args:
        folder: of the page.
        title: plain text.
        body: HTML.
    """
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    with atomic_write(folder / "index.html") as file:
        file.write(
            f"<!DOCTYPE html><html lang='en'><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n".encode()
        )
    return folder / "index.html"
