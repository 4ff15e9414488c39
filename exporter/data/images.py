"""Images that calibration needs: a row's own, typography in its place, and one that says nothing."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from exporter.data.calibration import CalibrationRow


def row_image(row: CalibrationRow) -> Image.Image:
    """The row's image, or its caption as typography where it has none."""
    return typographic_image(row.caption) if row.image is None else row.image.load()


def typographic_image(text: str, size: int = 336, font_size: int = 30) -> Image.Image:
    """Black text, wrapped, on white: [size, size] RGB."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=font_size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= size - 20:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    draw.multiline_text((10, 10), "\n".join(lines), font=font, fill="black", spacing=6)
    return image


def blank_image(size: int = 336) -> Image.Image:
    """Mid-grey, [size, size] RGB: an image that says nothing."""
    return Image.new("RGB", (size, size), (127, 127, 127))
