"""PEFT LoRA adapters: found, checked against the base's headers, and merged into its shards tensor by tensor.

Merging is PEFT's own (`LoraLayer.merge`), so the tensors are those of `PeftModel.merge_and_unload()` bit for bit; but it sees one
weight at a time, in the dtype that the base stores, and only shards that hold a changed tensor are written anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from exporter.checkpoint.layout import ADAPTER_FILES
from exporter.checkpoint.report import AdapterRecord
from exporter.errors import InputError, ShiftDCError
from exporter.models.base import BaseCheckpoint
from exporter.models.hub_snapshot import download
from exporter.models.shards import INDEX
from exporter.runtime.hashing import sha256
from exporter.runtime.linking import clone_or_copy, symlink_or_copy
from exporter.runtime.reading import UnreadableError, read_json
from exporter.runtime.safetensors_header import TensorHeader, read_header
from exporter.runtime.time_limit import limited

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = ADAPTER_FILES
#: Seconds of computing in which PEFT puts an adapter onto a model without weights.
LIMIT = 30.0
#: Settings under which an adapter holds more than low-rank factors.
_NOT_LOW_RANK = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk that passed the checks of `resolve_adapter`. `sha256` is over its configuration and weights."""

    name: str
    revision: str | None
    folder: Path
    sha256: str

    def record(self, kept: bool) -> AdapterRecord:
        return AdapterRecord(id=self.name, revision=self.revision, sha256=self.sha256, merged=not kept)


class _AdaptedTensor(NamedTuple):
    """A LoRA layer, and the base's tensor that it changes."""

    layer: LoraLayer
    shard: Path
    key: str


def resolve_adapter(name: str, base: BaseCheckpoint) -> Adapter:
    """Find `--adapter` (a folder, or a Hub id with @REVISION) and check that it is one for `base`. Raises InputError."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("--adapter: it needs PEFT, which is not installed; pip install 'shiftdc-export[adapters]'.")
    if Path(name).is_dir():
        folder, revision, name = Path(name).resolve(), None, Path(name).resolve().name
    else:
        name, _, wanted = name.partition("@")
        folder, revision = download(name, wanted or None, (CONFIG, "adapter_model.*"), "--adapter")
    config = _config(folder, name)
    _check_base(name, config, base)
    adapter = Adapter(name, revision, folder, adapter_sha256(folder))
    _targets(adapter, base)
    return adapter


def adapter_sha256(folder: Path) -> str:
    """One hash over what makes an adapter."""
    return hashlib.sha256("".join(sha256(folder / file) for file in ADAPTER_FILES).encode()).hexdigest()


def _config(folder: Path, name: str) -> dict[str, object]:
    try:
        config = read_json(folder / CONFIG)
    except UnreadableError as error:
        raise InputError(
            f"--adapter: {name} has no readable {CONFIG} ({error}); give the folder or Hub id of a PEFT adapter."
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"--adapter: the {CONFIG} of {name} names no peft_type; give the folder or Hub id of a PEFT adapter.")
    if kind != "LORA":
        raise InputError(f"--adapter: {name} is of type {kind:.50}, expected LORA; merge it yourself and give the merged model.")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists() or any(folder.glob("*.bin"))
        found = "only a pickle file, which can run code when loaded" if pickled else "none"
        raise InputError(f"--adapter: {name} has no {WEIGHTS} (found {found}); save it with safe_serialization=True.")
    more = [key for key in _NOT_LOW_RANK if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    tensors = [key for key in read_header(folder / WEIGHTS, "--adapter") if ".lora_" not in key]
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise InputError(f"--adapter: the {CONFIG} of {name} names code (megatron_core); give an adapter of transformers layers.")
    if more or tensors:
        raise InputError(
            f"--adapter: {name} holds more than low-rank factors ({(more or tensors)[0]}); "
            "merge it yourself with merge_and_unload() and give the merged model."
        )
    return config


def _check_base(name: str, config: Mapping[str, object], base: BaseCheckpoint) -> None:
    """Factors of another fine-tune of the same architecture fit by shape and do something else."""
    trained_on = config.get("base_model_name_or_path")
    if trained_on is not None and not isinstance(trained_on, str):
        raise InputError(
            f"--adapter: base_model_name_or_path in the {CONFIG} of {name} is a {type(trained_on).__name__} and no text; "
            "correct it."
        )
    if not trained_on or Path(trained_on).name == base.short_name or _is_folder(trained_on, base.folder):
        return
    raise InputError(
        f"--adapter: {name} was trained on {trained_on:.300}, and MODEL is {base.name}; give the adapter's own base model, "
        f"or correct base_model_name_or_path in {CONFIG} if it is the same one under another name."
    )


def _is_folder(path: str, folder: Path) -> bool:
    try:
        return Path(path).resolve() == folder
    except (OSError, ValueError, RuntimeError):  # too long, a null byte or half a character in it, a loop of links
        return False


def merge(base: BaseCheckpoint, adapter: Adapter, folder: Path) -> BaseCheckpoint:
    """Write the merged checkpoint into the empty `folder`, soon deleted: shards without a changed tensor are symbolic links."""
    targets = _targets(adapter, base)
    changed = {target.shard for target in targets}
    for shard in base.shards:
        (clone_or_copy if shard in changed else symlink_or_copy)(shard, folder / shard.name)
    for target in targets:
        merged = _merged(target)
        _overwrite(folder / target.shard.name, base.headers[target.shard][target.key], merged)
        target.layer.get_base_layer().weight = nn.Parameter(merged.to("meta"), requires_grad=False)
    for file in (Path("config.json"), Path("README.md"), Path(INDEX), *base.companions):
        if (base.folder / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / file, folder / file)
    return replace(base, folder=folder, shards=tuple(folder / shard.name if shard in changed else shard for shard in base.shards))


def changed_shards(adapter: Adapter, base: BaseCheckpoint) -> set[Path]:
    """The shards that merging writes anew."""
    return {target.shard for target in _targets(adapter, base)}


def _merged(target: _AdaptedTensor) -> torch.Tensor:
    with safe_open(target.shard, "pt") as stored:
        weight = stored.get_tensor(target.key).clone()
    target.layer.get_base_layer().weight = nn.Parameter(weight, requires_grad=False)
    target.layer.merge()
    merged = target.layer.get_base_layer().weight.data
    if merged.dtype != weight.dtype or merged.shape != weight.shape or not torch.isfinite(merged).all():
        raise InputError(
            f"--adapter: merging it spoils {target.key} (not finite, or of another dtype or shape); check the adapter."
        )
    return merged


def _overwrite(file: Path, header: TensorHeader, value: torch.Tensor) -> None:
    """Put `value` in the place of a tensor of the same dtype and shape: all other bytes stay."""
    data = value.contiguous().view(torch.uint8).numpy().tobytes()
    assert len(data) == header.bytes
    with file.open("r+b") as stream:
        stream.seek(header.start)
        stream.write(data)


def _targets(adapter: Adapter, base: BaseCheckpoint) -> list[_AdaptedTensor]:
    """The LoRA layers of a base without weights, with the adapter's factors loaded. Raises InputError."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    stored = dict(_stored_names(model, base))
    layers = _with_factors(adapter, base, model)
    targets = []
    for path, layer in layers:
        shard, key, converted = stored.get(f"{path}.weight", (None, None, None))
        if shard is None or key is None or converted:
            why = "is stored in another form" if converted else "shares its weight with another layer"
            raise InputError(f"--adapter: {adapter.name} changes {path}, which {why} in {base.name}; merge it yourself.")
        targets.append(_AdaptedTensor(layer, shard, key))
    return targets


def _stored_names(model: PreTrainedModel, base: BaseCheckpoint) -> Iterator[tuple[str, tuple[Path, str, bool]]]:
    """Name in the model -> (shard, name there, whether loading computes it from several tensors or changes its form)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    for shard, header in base.headers.items():
        for key in header:
            name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            yield name, (shard, key, converter is not None)


def _with_factors(adapter: Adapter, base: BaseCheckpoint, model: PreTrainedModel) -> list[tuple[str, LoraLayer]]:
    """(path, LoRA layer) with the adapter's factors on the CPU and the base's weights nowhere. Raises InputError."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights

    endless = f"--adapter: a pattern in the {CONFIG} of {adapter.name} is not matched within {LIMIT:g} seconds; correct it."
    try:
        with limited(LIMIT, endless):
            tuned = PeftModel(model, PeftConfig.from_pretrained(str(adapter.folder)))
            layers = [(path, m) for path, m in tuned.get_base_model().named_modules() if isinstance(m, LoraLayer)]
            factors = [p for _, layer in layers for p in _on_cpu(layer)]
            result = set_peft_model_state_dict(tuned, load_peft_weights(str(adapter.folder), device="cpu"))
            left_over: list[str] = getattr(result, "unexpected_keys")  # noqa: B009 (torch's type has no names)
    except ShiftDCError:
        raise
    except Exception as error:  # PEFT checks few of its settings, and raises what comes of them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
        raise InputError(
            f"--adapter: {adapter.name} does not fit {base.name}: {reason:.500}; give the adapter's own base model."
        ) from error
    if left_over or any(p.isnan().any() for p in factors):
        what = f"it holds {left_over[0]}" if left_over else "it lacks some of the factors that its configuration names"
        raise InputError(f"--adapter: {adapter.name} does not fit {base.name}: {what}; give the adapter's own base model.")
    return layers


def _on_cpu(layer: LoraLayer) -> list[torch.Tensor]:
    """The layer's factors, NaN until they are loaded."""
    for name, child in layer.named_children():
        if name != "base_layer":
            child.to_empty(device="cpu")
    factors = [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]
    for factor in factors:
        factor.data.fill_(torch.nan)
    return factors
