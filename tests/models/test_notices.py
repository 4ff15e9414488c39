"""What transformers says while loading: recorded, passed over as harmless, or an error."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
import transformers
from transformers.utils import logging as transformers_logging

from exporter.errors import InputError
from exporter.models.notices import HARMLESS, WRONG, noticed

logger = transformers_logging.get_logger("transformers.some.module")
FOLDER = Path("/home/someone/models/base")


def test_messages_and_warnings_are_collected_once_and_not_printed(capsys):
    with noticed("MODEL", FOLDER) as found:
        logger.warning("A key\nis unused in %s/config.json.", FOLDER)
        logger.warning("A key\nis unused in %s/config.json.", FOLDER)
        logger.warning_once("Once")
        logger.info("no matter")
        warnings.warn("A field is ignored", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert found == ["A key is unused in base/config.json", "Once", "A field is ignored"]
    assert capsys.readouterr() == ("", "")


def test_what_is_said_once_a_process_is_said_of_each_checkpoint():
    for _ in range(2):
        with noticed("MODEL", FOLDER) as found:
            logger.warning_once("Falling back")
        assert found == ["Falling back"]


def test_nothing_is_lost_where_the_libraries_are_quiet():
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with noticed("MODEL", FOLDER) as found:
            logger.warning("said")
        assert (found, transformers_logging.get_verbosity()) == (["said"], logging.ERROR)
    finally:
        transformers_logging.set_verbosity(level)


def test_settings_are_restored_after_an_error():
    root = transformers_logging.get_logger("transformers")
    before = (root.level, root.handlers)
    with pytest.raises(KeyError), noticed("MODEL", FOLDER):
        raise KeyError
    assert (root.level, root.handlers) == before


def test_a_message_is_one_short_line():
    with noticed("MODEL", FOLDER) as found:
        logger.warning("\x1b[31m\n" + "x" * 5000)
    assert len(found[0]) < 520 and "\x1b" not in found[0]


@pytest.mark.parametrize(
    "said",
    [
        "Could not load tokenizer from subfolder `qformer_tokenizer`. Falling back to loading from the root directory. "
        "This behavior is deprecated and will be removed in a future version.",
        "Could not extract SentencePiece model from /x using sentencepiece library due to y. Falling back to TikToken extractor.",
    ],
)
def test_another_tokenizer_is_an_error(said):
    with (
        pytest.raises(InputError, match=r"^MODEL: x is not loaded as its maker published it \(Could not .*\); restore its .*\.$"),
        noticed("MODEL: x", FOLDER),
    ):
        logger.warning(said)


def test_patterns_are_of_the_installed_transformers():
    """Its words change: a pattern that nothing there can say guards against nothing."""
    root = Path(transformers.__file__).parent
    files = [*root.glob("*.py"), *(root / "models" / "auto").glob("*.py")]
    source = "".join(f.read_text("utf-8") for f in files)
    for pattern in (*WRONG, *HARMLESS):
        words = re.split(r"`|\(|\\|\$|shiftdc", pattern.lstrip("^").replace("`?", "`"))[0 if not pattern.startswith("^`") else 1]
        words = words.split("|")[0].strip()
        assert words in source, pattern


def test_the_report_has_them(base_folder, tmp_path, calibration_file):
    from exporter.pipeline.export import export
    from exporter.pipeline.plan import ExportOptions, make_plan

    base = shutil.copytree(base_folder, tmp_path / "base")
    settings = json.loads((base / "processor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps({**settings, "fake_image_token": "<image>"}))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["pad_token_id"] = -1
    (base / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    done = export(make_plan(str(base), ExportOptions.of(output=output, layers="1", calibration=str(calibration_file))))
    said = list(done.report.warnings)
    assert json.loads((output / "shiftdc_report.json").read_text())["warnings"] == said
    assert any("pad_token_id must be" in line for line in said), said
    assert "processor_config.json has settings that LlavaProcessor does not take: fake_image_token" in said
    assert not any(str(tmp_path) in line for line in said)
