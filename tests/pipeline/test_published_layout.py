"""The file layout of llava-hf's repositories: preprocessor_config.json, chat_template.json, no template elsewhere."""

from __future__ import annotations

import json
import shutil

from tiny import TEMPLATE
from transformers import AutoProcessor

from exporter.models.base import resolve


def test_older_processor_files(base_folder, make_export, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "llava-old")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    processor = json.loads((folder / "processor_config.json").read_text())
    image_processor = processor.pop("image_processor")
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps({**image_processor, "processor_class": "LlavaProcessor"}))
    (folder / "README.md").write_text("the base model's own card")
    base = resolve(str(folder))
    assert base.has_chat_template
    output = make_export(base=folder, caption_max_new_tokens=4).plan.output
    assert AutoProcessor.from_pretrained(output, trust_remote_code=False).chat_template == TEMPLATE
    assert "calibrated with ShiftDC" in (output / "README.md").read_text()
