"""Pictures of scenes: an icon, the thing's name as typography, or both, 64 pixels wide."""

import random
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from exporter.data.demo.world import Scene, Thing

SIZE = 64
LINE = 14
INKS = {
    "red": (235, 50, 50),
    "green": (60, 210, 70),
    "blue": (70, 110, 250),
    "yellow": (240, 230, 60),
    "purple": (180, 60, 220),
    "orange": (250, 150, 40),
}
WHITE = (245, 245, 245)

Ink = tuple[int, int, int]
Box = tuple[int, int, int, int]
Shape = tuple[str, Box, int]


def draw(scene: Scene, variant: str) -> Image.Image:
    """A picture of the scene; `variant` seeds background and position."""
    rng = random.Random(f"{scene.thing.name} {scene.color} {scene.kind} {variant}")
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(0, 40) for _ in range(3)))
    canvas, ink, lines = ImageDraw.Draw(picture), INKS[scene.color], scene.thing.name.split()
    left = 2 + rng.randint(-1, 1)
    if scene.kind == "SD":
        _icon(canvas, scene.thing, 16 * rng.randint(0, 2) + rng.randint(-1, 1), 16 * rng.randint(0, 2), ink)
    elif scene.kind == "TYPO":
        _words(canvas, lines, left, rng.choice((0, 15, 30, 44)[: 5 - len(lines)]) + rng.randint(-1, 1), ink)
    else:
        _icon(canvas, scene.thing, 16 * rng.randint(0, 2) + rng.randint(-1, 1), rng.randint(0, 1), ink)
        _words(canvas, lines, left, rng.randint(30, 32) + 8 * (len(lines) == 1), ink)
    return picture


@cache
def _shapes(thing: Thing) -> tuple[Shape, ...]:
    """The thing's icon: three large shapes and a small one in a box of 32 pixels, each with a turning angle."""
    rng = random.Random("icon " + thing.name)
    shapes = []
    for low, high in ((10, 26), (10, 26), (10, 26), (6, 10)):
        width, height = rng.randint(low, high), rng.randint(low, high)
        left, top = rng.randint(0, 31 - width), rng.randint(0, 31 - height)
        form = rng.choice(("ellipse", "rectangle", "triangle", "line", "ring", "arc"))
        shapes.append((form, (left, top, left + width, top + height), rng.randint(0, 180)))
    return tuple(shapes)


def _icon(canvas: ImageDraw.ImageDraw, thing: Thing, x: int, y: int, ink: Ink) -> None:
    """Draw the thing's icon with its upper left corner at (x, y)."""
    dark = (ink[0] // 3, ink[1] // 3, ink[2] // 3)
    for (form, (left, top, right, bottom), angle), fill in zip(_shapes(thing), (ink, dark, ink, WHITE), strict=True):
        _shape(canvas, form, (x + left, y + top, x + right, y + bottom), angle, fill)


def _shape(canvas: ImageDraw.ImageDraw, form: str, box: Box, angle: int, fill: Ink) -> None:
    """Draw one shape into its box."""
    left, top, right, bottom = box
    if form == "ellipse":
        canvas.ellipse(box, fill=fill)
    elif form == "rectangle":
        canvas.rectangle(box, fill=fill)
    elif form == "triangle":
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)
    elif form == "line":
        canvas.line(box, fill=fill, width=4)
    elif form == "ring":
        canvas.ellipse(box, outline=fill, width=3)
    else:
        canvas.arc(box, angle, angle + 200, fill=fill, width=4)


def _words(canvas: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, ink: Ink) -> None:
    """Write a name, one word to a line."""
    font = _font(max(lines, key=len))
    for row, word in enumerate(lines):
        canvas.text((x, y + LINE * row), word, font=font, fill=ink)


@cache
def _font(longest: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest built-in font, 10 to 16 pixels, in which the longest word fits the picture."""
    sizes = range(16, 10, -1)
    fonts = (ImageFont.load_default(size=size) for size in sizes)
    return next((font for font in fonts if font.getlength(longest) <= SIZE - 4), ImageFont.load_default(size=10))
