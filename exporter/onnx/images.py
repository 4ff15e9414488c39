"""Pictures to pixel values with numpy and Pillow, as CLIP-style processors do it; reads preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from exporter.errors import InputError
from exporter.onnx.settings import ImageSettings

Pixels = npt.NDArray[np.float32]
#: Settings whose other values change pixels in a way that is not written here.
_NOT_HERE = ("do_pad", "do_image_splitting", "do_pan_and_scan", "crop_to_patches", "image_grid_pinpoints")


class ImageProcessor:
    """Resize, crop, scale and normalise, each where the config asks for it."""

    def __init__(self, config: ImageSettings):
        if used := [name for name in _NOT_HERE if config.get(name)]:
            raise InputError(
                f"preprocessor_config.json: {used[0]} is not supported without transformers; make pixel_values with its "
                "processor and give them to generate()."
            )
        self.config = config

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        """float32 [images, 3, height, width]."""
        return np.stack([self._pixels(image) for image in images])

    def _pixels(self, image: Image.Image) -> Pixels:
        config = self.config
        if config.get("do_convert_rgb", True) and image.mode != "RGB":
            image = image.convert("RGB")
        if config.get("do_resize"):
            image = image.resize(self._size(image), resample=Image.Resampling(config.get("resample", 3)))
        pixels = np.asarray(image)
        if config.get("do_center_crop"):
            pixels = center_cropped(pixels, config["crop_size"]["height"], config["crop_size"]["width"])
        pixels = pixels.astype(np.float32)
        if config.get("do_rescale"):
            pixels = pixels * np.float32(config["rescale_factor"])
        if config.get("do_normalize"):
            mean, deviation = (np.asarray(config[name], np.float32) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / deviation
        return pixels.transpose(2, 0, 1)

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) to resize to."""
        size = self.config["size"]
        if "shortest_edge" not in size:
            return size["width"], size["height"]
        short, long = sorted(image.size)
        longer = int(size["shortest_edge"] * long / short)
        return (size["shortest_edge"], longer) if image.width <= image.height else (longer, size["shortest_edge"])


def center_cropped(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The middle of `pixels` [height, width, 3]; black where the picture is smaller."""
    missing = [max(0, wanted - found) for wanted, found in zip((height, width), pixels.shape[:2], strict=True)]
    if any(missing):
        before = [-(-m // 2) for m in missing]
        pixels = np.pad(pixels, [*((b, m - b) for b, m in zip(before, missing, strict=True)), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
