"""The model families: the modeling code that each one's exports carry."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as STOCK

from exporter import modeling
from exporter.errors import InputError
from exporter.modeling import configuration_shiftdc
from exporter.modeling.configuration_shiftdc import ShiftDCConfigMixin
from exporter.modeling.modeling_shiftdc import ShiftDCMixin

#: Classes whose forward pass or generate() needs code of its own, by model_type; all others share one file.
OWN_CODE = {
    "blip-2": "modeling_shiftdc_blip",
    "instructblip": "modeling_shiftdc_blip",
    "mllama": "modeling_shiftdc_mllama",
}


@dataclass(frozen=True)
class Family:
    """The classes and source files that a family's exports carry."""

    module: str
    config: type[ShiftDCConfigMixin]
    model: type[ShiftDCMixin]

    @property
    def stock_class(self) -> str:
        """Name of the transformers class that the model class calibrates."""
        return next(c.__name__ for c in self.model.__mro__ if c.__module__.startswith("transformers."))

    @property
    def files(self) -> tuple[Path, ...]:
        """The file with the model class and those that it imports."""
        return tuple(sorted(_with_imports(Path(modeling.__file__).parent / f"{self.module}.py")))


def _with_imports(file: Path) -> set[Path]:
    siblings = re.findall(r"^from \.(\w+) import", file.read_text("utf-8"), re.MULTILINE)
    return {file}.union(*(_with_imports(file.with_name(f"{name}.py")) for name in siblings))


@cache
def family(name: str) -> Family:
    """The modeling code of a transformers model_type. Raises InputError."""
    stock = getattr(transformers, STOCK.get(name, ""), None)
    if stock is None:
        raise InputError(
            f"Recipe: transformers {transformers.__version__} has no class for family {name!r}; upgrade it, or see "
            "'shiftdc-export recipes'."
        )
    module = OWN_CODE.get(name, "modeling_shiftdc")
    code = importlib.import_module(f"exporter.modeling.{module}")
    config = getattr(configuration_shiftdc, f"ShiftDC{stock.config_class.__name__}")
    return Family(module, config, getattr(code, f"ShiftDC{stock.__name__}"))
