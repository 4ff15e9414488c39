"""The model families: the modeling code that each one's exports carry."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from exporter import modeling
from exporter.errors import InputError
from exporter.modeling.configuration_shiftdc import ShiftDCConfigMixin
from exporter.modeling.modeling_shiftdc import ShiftDCMixin


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
        """The family's file and those that it imports."""
        return tuple(sorted(_with_imports(Path(modeling.__file__).parent / f"{self.module}.py")))


def _with_imports(file: Path) -> set[Path]:
    siblings = re.findall(r"^from \.(\w+) import", file.read_text("utf-8"), re.MULTILINE)
    return {file}.union(*(_with_imports(file.with_name(f"{name}.py")) for name in siblings))


def family(name: str) -> Family:
    """The modeling code of a transformers model_type. Raises InputError."""
    module = f"modeling_shiftdc_{name.replace('-', '_')}"
    try:
        code = importlib.import_module(f"exporter.modeling.{module}")
    except ModuleNotFoundError as error:
        raise InputError(f"Recipe: there is no modeling code for family {name!r}; see 'shiftdc-export recipes'.") from error
    own = [c for c in vars(code).values() if isinstance(c, type) and c.__module__ == code.__name__]
    model = next((c for c in own if issubclass(c, ShiftDCMixin)), None)
    config: type[ShiftDCConfigMixin] | None = getattr(model, "config_class", None)
    if config is None or model is None:  # a module that families share
        raise InputError(f"Recipe: there is no modeling code for family {name!r}; see 'shiftdc-export recipes'.")
    return Family(module, config, model)
