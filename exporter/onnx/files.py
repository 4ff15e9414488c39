"""The files of an ONNX folder: graphs, and configs of its own that transformers.js reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.onnx.families import GraphFamily
from exporter.onnx.interface import GRAPHS, JS_NAMES, graph_file

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from exporter.models.vlm import VLM

#: A protobuf file of 2 GB cannot be read; larger graphs keep their weights beside them.
LARGEST_FILE = 1_900_000_000
#: Tensors below this many bytes stay in the graph's file.
SMALL_TENSOR = 1024


def save_graph(exported: ir.Model, file: Path, largest: int = LARGEST_FILE) -> None:
    """Write an onnx_ir model, with its weights in `<file>_data` where they are many, and check it."""
    import onnx
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in exported.graph.initializers.values())
    if size > largest:
        ir.save(exported, file, external_data=f"{file.name}_data", size_threshold_bytes=SMALL_TENSOR)
    else:
        ir.save(exported, file)
    onnx.checker.check_model(str(file), full_check=True)


def external_data(folder: Path, precisions: tuple[str, ...]) -> dict[str, int]:
    """Graph files that have a data file."""
    names = [graph_file(graph, p) for p in precisions for graph in GRAPHS]
    return {name: 1 for name in names if (folder / f"{name}_data").is_file()}


def sizes(folder: Path, precision: str) -> dict[str, int]:
    """Bytes of each graph at a precision, weights included."""
    return {graph: sum(f.stat().st_size for f in folder.glob(f"{graph_file(graph, precision)}*")) for graph in GRAPHS}


def write_configs(vlm: VLM, family: GraphFamily, folder: Path, precisions: tuple[str, ...], wording: dict[str, str]) -> None:
    """Everything beside the graphs. `wording`: the recipe's prompts, for clients that compose texts and not token ids."""
    write_json(folder / "config.json", model_config(vlm, family, external_data(folder, precisions), wording))
    write_json(folder / "generation_config.json", generation_config(vlm.model))
    with tempfile.TemporaryDirectory() as saved:
        vlm.processor.save_pretrained(saved)
        read = {f.name: json.loads(f.read_text("utf-8")) for f in Path(saved).glob("*_config.json")}
    vlm.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    template = vlm.processor.chat_template or vlm.tokenizer.chat_template
    named = type(vlm.processor).__name__
    (folder / "chat_template.jinja").write_text(template, "utf-8")  # some of transformers.js' processors read only this
    tokens = {**read["tokenizer_config.json"], "chat_template": template, "padding_side": "left"}
    write_json(folder / "tokenizer_config.json", tokens)
    images = vlm.processor.image_processor
    kind = type(images).__name__.removesuffix("Pil").removesuffix("Fast")
    flat = {**json.loads(images.to_json_string()), "image_processor_type": kind, "processor_class": named}
    write_json(folder / "preprocessor_config.json", flat)
    whole = {k: v for k, v in read["processor_config.json"].items() if k not in ("image_processor", "video_processor")}
    # transformers.js never takes the class token off: these values make its count right
    count = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"} if "patch_size" in whole else {}
    write_json(folder / "processor_config.json", {**whole, **count, "processor_class": named})


def model_config(vlm: VLM, family: GraphFamily, data: dict[str, int], wording: dict[str, str]) -> dict[str, object]:
    """config.json under the family's own model_type, with everything explicit that a client may read."""
    config = vlm.model.config
    stock = next(c.__name__ for c in type(vlm.model).__mro__ if c.__module__.startswith("transformers."))
    text = config.get_text_config()
    explicit = {
        name: getattr(text, name) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    }
    image = None if family.image_text is None else family.image_text(vlm.processor, features_per_image(vlm))
    shifts = [c.shift.item() for c in vlm.model.shiftdc_corrections]
    onnx = {
        "image": image,
        "shifts": shifts,
        "blank_pixel": vlm.traits.blank_pixel,
        "message": family.positions_free,
        "prompts": wording,
    }
    token = {"image_token_id": config.image_token_id, "image_token_index": config.image_token_id}
    return {
        **{k: v for k, v in config.to_dict().items() if k not in ("auto_map", "_name_or_path", "quantization_config")},
        "model_type": family.js_type,
        "architectures": [stock],
        "text_config": {**text.to_dict(), **explicit},
        **(explicit if family.js_type == "qwen2_vl" else {}),  # transformers.js reads them at the top there
        **token,
        "shiftdc": {**config.shiftdc, "onnx": onnx},
        "transformers.js_config": {
            "kv_cache_dtype": {JS_NAMES["fp16"]: "float16"},
            **({"use_external_data_format": data} if data else {}),
        },
    }


def features_per_image(vlm: VLM) -> int:
    from PIL import Image

    return vlm.token_ids("a", Image.new("RGB", (64, 64))).count(vlm.image_token_id)


def generation_config(model: PreTrainedModel) -> dict[str, object]:
    end, pad = end_tokens(model)
    written = {k: v for k, v in json.loads(model.generation_config.to_json_string()).items() if v is not None}
    return {**written, "eos_token_id": end if len(end) > 1 else end[0], "pad_token_id": pad}


def end_tokens(model: PreTrainedModel) -> tuple[list[int], int]:
    """(ids that end a reply, the padding id)."""
    eos = model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    ends = [eos] if isinstance(eos, int) else list(eos)
    pad = model.generation_config.pad_token_id
    return ends, min(ends) if pad is None else pad


def write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
