"""Files that lie at the top of the repository and travel inside the wheel: recipes and the card template."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def resource(name: str) -> Path:
    """`recipes` or `MODEL_CARD_TEMPLATE.md`, from the wheel or from the checkout of an editable install."""
    bundled = _PACKAGE / "_resources" / name
    return bundled if bundled.exists() else _PACKAGE.parent / name
