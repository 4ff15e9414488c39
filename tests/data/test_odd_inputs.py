"""Inputs that are odd and right: they work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.cli.commands import main
from exporter.data.pictures import read_picture

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def close(found: tuple[int, ...], expected: tuple[int, int, int]) -> bool:
    return all(abs(a - b) < 60 for a, b in zip(found, expected, strict=True))


@pytest.fixture
def halves():
    """40 x 20: red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"),
    [(1, (40, 20), RED), (2, (40, 20), BLUE), (3, (40, 20), BLUE), (6, (20, 40), RED), (8, (20, 40), BLUE)],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_their_exif_data_say(halves, tmp_path, kind, orientation, size, top_left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves.save(tmp_path / "a", kind, exif=exif)
    image = read_picture(tmp_path / "a")
    assert (image.mode, image.size) == ("RGB", size)
    assert close(image.getpixel((3, 3)), top_left)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(tmp_path, kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    image = read_picture(tmp_path / "a")
    assert image.mode == "RGB" and close(image.getpixel((5, 5)), RED)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert close(read_picture(tmp_path / "a.jpg").getpixel((4, 4)), RED)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, kind):
    Image.fromarray(np.array([[0, 100 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "a", kind)
    image = read_picture(tmp_path / "a")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency(halves, tmp_path):
    palette = halves.quantize(4)
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128, 255, 255]))
    image = read_picture(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert close(image.getpixel((3, 3)), RED) and close(image.getpixel((35, 3)), BLUE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "I;16", "P"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getpixel((1, 1)) == (0, 0, 0)


def plan(folder: Path, *arguments: object) -> str:
    done = CliRunner().invoke(main, [os.fspath(a) for a in ("--dry-run", *arguments, "--", folder)])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 17
    return done.stdout


NAMES = ["two words", "\U0001f9ca", "line\nbreak", "-dash", "n" * 236, "\u05e9\u05dc\u05d5\u05dd"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_folders(base_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, name)
    shown = plan(name, f"--output=out {name}"[:245])
    assert "two words" in shown if name == "two words" else shown


@pytest.mark.parametrize(("model", "output"), [("base \udcff", "out"), ("base", "out \udcff"), ("base", "\udcff/out")])
def test_names_that_are_not_utf_8(base_folder, tmp_path, monkeypatch, model, output):
    """No tokenizer can be opened below them, which would be found at the end of an export."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, model)
    done = CliRunner().invoke(main, ["--dry-run", "--output", output, model])
    assert (done.exit_code, "is not UTF-8" in done.stderr, "rename it" in done.stderr) == (2, True, True)


def test_an_export_with_an_odd_name(base_folder, calibration_file, tmp_path):
    name = "-two words\n\U0001f9ca"
    base = shutil.copytree(base_folder, tmp_path / name / name)
    out = tmp_path / name / "out\n"
    arguments = ["--layers", "1", "--calibration", str(calibration_file), "--quiet", f"--output={out}", str(base)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(f.name for f in (tmp_path / name).iterdir()) == [name, "out\n"]
    done = CliRunner().invoke(main, ["verify", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)


def test_a_model_in_a_hub_cache(hub_snapshot, tmp_path):
    plan(hub_snapshot, "--output", tmp_path / "out")
