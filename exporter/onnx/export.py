"""ONNX graphs of a calibrated checkpoint, in its folder `onnx/`: trace, convert, compare with PyTorch, and only then keep."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporter.checkpoint.earlier import NOTHING, Contents, contents, few
from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.manifest import rehashed, shipped
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import OnnxRecord, Report, read_report
from exporter.checkpoint.staging import replaced
from exporter.errors import InputError, VerificationError
from exporter.onnx.families import GraphFamily, graph_family
from exporter.onnx.files import end_tokens, save_graph, sizes, write_configs
from exporter.onnx.interface import EMBED, GRAPHS, SUFFIXES, graph_file
from exporter.onnx.parity import Parity, expected, failures, parity_of
from exporter.onnx.trace import export_graphs
from exporter.onnx.variants import write_int8, write_q4
from exporter.runtime.progress import Progress, silent
from exporter.runtime.reading import Json

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.models.vlm import VLM

FOLDER = "onnx"
#: Packages of the extra `onnx`.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Variant:
    """The graphs of one precision: bytes of each, weights included, and how they compare with PyTorch."""

    bytes: dict[str, int]
    parity: Parity

    def as_json(self) -> dict[str, object]:
        return {"bytes": self.bytes, **asdict(self.parity)}


@dataclass(frozen=True)
class OnnxEntry:
    """What the report says of the graphs: packages that made them, and variants by precision."""

    versions: dict[str, str]
    variants: dict[str, Variant]

    def as_json(self) -> dict[str, object]:
        return {"versions": self.versions, "variants": {name: variant.as_json() for name, variant in self.variants.items()}}


def parse_precisions(text: str) -> tuple[str, ...]:
    """`"fp32,int8"` as precisions, in the order of SUFFIXES. Raises InputError."""
    wanted = [part.strip() for part in text.split(",")]
    if unknown := [p for p in wanted if p not in SUFFIXES]:
        raise InputError(
            f"--precision: {unknown[0]!r} is not a precision, expected some of {', '.join(SUFFIXES)}, with commas between them."
        )
    return tuple(p for p in SUFFIXES if p in wanted)


def check_packages() -> None:
    """Raise InputError unless the extra is installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f'ONNX: {missing[0]} is not installed; run: pip install "shiftdc-export[onnx]"')


def check_family(name: str, config: Mapping[str, Json]) -> GraphFamily:
    """Raise InputError unless the extra is installed and there are graphs for a checkpoint of a family."""
    check_packages()
    return graph_family(name, config)


def export_onnx(checkpoint: Path, precisions: Sequence[str], progress: Progress = silent) -> OnnxEntry:
    """Write CHECKPOINT/onnx and its entry in the report; returns the entry.

    Raises InputError, and VerificationError where a precision does not give what PyTorch gives; then nothing is left of it.
    """
    if not (checkpoint / REPORT).is_file():
        raise InputError(f"CHECKPOINT: {checkpoint} has no {REPORT}; give a folder that shiftdc-export wrote.")
    report = read_report(checkpoint)
    family = check_family(report.recipe.family, json.loads((checkpoint / "config.json").read_text("utf-8")))
    target = checkpoint / FOLDER
    with replaced(target, lambda: _check_ours(target, report)) as folder:
        wording = report.recipe.wording.model_dump(include={"caption", "text_counterpart"})
        entry = _write(checkpoint, family, tuple(precisions), folder, wording, progress)
        if broken := [sentence for name, variant in entry.variants.items() for sentence in failures(name, variant.parity)]:
            raise VerificationError(f"The ONNX graphs are not kept, because they differ from PyTorch: {'; '.join(broken)}.")
    _attach(checkpoint, entry)
    return entry


def _write(
    checkpoint: Path,
    family: GraphFamily,
    precisions: tuple[str, ...],
    folder: Path,
    wording: dict[str, str],
    progress: Progress,
) -> OnnxEntry:
    steps = len(precisions) + 2
    vlm = open_export(checkpoint, dtype="float32", device_map="cpu")
    eos, _ = end_tokens(vlm.model)
    progress("ONNX", 0, steps)
    wanted = expected(vlm, eos)
    progress("ONNX", 1, steps)
    with _exporter_quiet():
        _trace(vlm, family, eos, precisions, folder)
    progress("ONNX", 2, steps)
    if "int8" in precisions:
        write_int8(folder)
    if "q4" in precisions:
        write_q4(folder)
    write_configs(vlm, family, folder, precisions, wording)
    variants = {}
    for done, precision in enumerate(precisions):
        variants[precision] = Variant(sizes(folder, precision), parity_of(folder, precision, wanted))
        progress("ONNX", 3 + done, steps)
    if "fp32" not in precisions:
        for file in [file for graph in GRAPHS for file in folder.glob(f"{graph_file(graph, 'fp32')}*")]:
            file.unlink()
    return OnnxEntry({name: importlib.metadata.version(name) for name in PACKAGES}, variants)


def _trace(vlm: VLM, family: GraphFamily, eos: Sequence[int], precisions: Sequence[str], folder: Path) -> None:
    """Float32 graphs, from which smaller ones are made, and float16 ones; the model keeps halved weights."""
    _save(export_graphs(vlm, family, eos), folder, "fp32")
    if not set(precisions) - {"fp32"}:
        return
    halve(vlm.model)
    halves = export_graphs(vlm, family, eos, GRAPHS if "fp16" in precisions else (EMBED,))
    for precision in precisions:  # the embedding is a table: float16 is as small as it gets
        if precision != "fp32":
            _save(halves if precision == "fp16" else {EMBED: halves[EMBED]}, folder, precision)


def halve(model: torch.nn.Module) -> None:
    """Weights in float16. Buffers stay: RoPE's frequencies, rounded, would turn far positions by tenths of a radian."""
    for weight in model.parameters():
        weight.data = weight.data.half()


def _save(graphs: Mapping[str, ir.Model], folder: Path, precision: str) -> None:
    for graph, exported in graphs.items():
        save_graph(exported, folder / graph_file(graph, precision))


def _check_ours(folder: Path, report: Report) -> Contents:
    """What is in an earlier `onnx` folder. Raises InputError where there is anything in it that the export does not list."""
    if not folder.exists():
        return NOTHING
    found = contents(folder, {p.removeprefix(f"{FOLDER}/"): h for p, h in report.files.items() if p.startswith(f"{FOLDER}/")})
    if found.others:
        raise InputError(f"CHECKPOINT: {folder} holds what is not of the export ({few(found.others)}); move it away.")
    return found


def _attach(checkpoint: Path, entry: OnnxEntry) -> None:
    """Put the entry and the files' hashes into the report, and what the graphs are into the card."""
    from exporter.publishing.attach import write_report_and_card

    report = read_report(checkpoint)
    others = {p: hashed for p, hashed in report.files.items() if not p.startswith(f"{FOLDER}/")}
    report = report.model_copy(update={"onnx": OnnxRecord.model_validate(entry.as_json()), "files": others})
    written = [p for p in shipped(checkpoint) if p.startswith(f"{FOLDER}/")]
    write_report_and_card(checkpoint, rehashed(report, checkpoint, written))


@contextmanager
def _exporter_quiet() -> Iterator[None]:
    """torch.onnx tells of optional packages, and of axes that share a name as they should."""
    loggers = [logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in ("_registration", "_core")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
