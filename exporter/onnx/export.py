"""ONNX graphs of a calibrated checkpoint, in its folder `onnx/`: trace, convert, compare with PyTorch, and only then keep."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.earlier import NOTHING, Contents, contents, few
from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.manifest import rehashed, shipped
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import OnnxRecord, Report, read_report
from exporter.checkpoint.staging import replaced
from exporter.errors import InputError, VerificationError
from exporter.onnx.families import GraphFamily, graph_family
from exporter.onnx.interface import EMBED, GRAPHS, SUFFIXES, graph_file
from exporter.onnx.trace import export_graphs
from exporter.runtime.progress import Progress, silent

FOLDER = "onnx"
#: Packages of the extra `onnx`.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parse_precisions(text: str) -> tuple[str, ...]:
    """`"fp32,int8"` as precisions, in the order of SUFFIXES. Raises InputError."""
    wanted = [part.strip() for part in text.split(",")]
    if unknown := [p for p in wanted if p not in SUFFIXES]:
        raise InputError(f"--precision: {unknown[0]!r} is none, expected of {', '.join(SUFFIXES)}, with commas between them.")
    return tuple(p for p in SUFFIXES if p in wanted)


def check_packages() -> None:
    """Raise InputError unless the extra is installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f'ONNX: {missing[0]} is not installed; run: pip install "shiftdc-export[onnx]"')


def check_family(name: str, config: Mapping[str, Any]) -> GraphFamily:
    """Raise InputError unless the extra is installed and there are graphs for a checkpoint of a family."""
    check_packages()
    return graph_family(name, config)


def export_onnx(checkpoint: Path, precisions: Sequence[str], progress: Progress = silent) -> dict[str, Any]:
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
        if broken := [sentence for found in entry["variants"].values() for sentence in found.pop("failures")]:
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
) -> dict[str, Any]:
    from exporter.onnx import files as onnx_files
    from exporter.onnx import parity as onnx_parity
    from exporter.onnx import variants as onnx_variants

    steps = len(precisions) + 2
    vlm = open_export(checkpoint, dtype="float32", device_map="cpu")
    eos, _ = onnx_files.end_tokens(vlm.model)
    progress("ONNX", 0, steps)
    wanted = onnx_parity.expected(vlm, eos)
    progress("ONNX", 1, steps)
    with _exporter_quiet():
        _save(export_graphs(vlm, family, eos), folder, "fp32")
        if set(precisions) - {"fp32"}:
            halve(vlm.model)
            graphs = GRAPHS if "fp16" in precisions else (EMBED,)
            halves = export_graphs(vlm, family, eos, graphs)
            for precision in precisions:  # the embedding is a table: float16 is as small as it gets
                if precision != "fp32":
                    _save(halves if precision == "fp16" else {EMBED: halves[EMBED]}, folder, precision)
    progress("ONNX", 2, steps)
    if "int8" in precisions:
        onnx_variants.write_int8(folder)
    if "q4" in precisions:
        onnx_variants.write_q4(folder)
    onnx_files.write_configs(vlm, family, folder, precisions, wording)
    variants = {}
    for done, precision in enumerate(precisions):
        parity = onnx_parity.compare(folder, precision, wanted)
        variants[precision] = {
            "bytes": onnx_files.sizes(folder, precision),
            **parity,
            "failures": onnx_parity.failures(precision, parity),
        }
        progress("ONNX", 3 + done, steps)
    if "fp32" not in precisions:
        for graph in GRAPHS:
            for file in folder.glob(f"{graph_file(graph, 'fp32')}*"):
                file.unlink()
    return {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "variants": variants}


def halve(model: torch.nn.Module) -> None:
    """Weights in float16. Buffers stay: RoPE's frequencies, rounded, would turn far positions by tenths of a radian."""
    for weight in model.parameters():
        weight.data = weight.data.half()


def _save(graphs: dict[str, Any], folder: Path, precision: str) -> None:
    from exporter.onnx.files import save_graph

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


def _attach(checkpoint: Path, entry: dict[str, Any]) -> None:
    """Put the entry and the files' hashes into the report, and what the graphs are into the card."""
    from exporter.publishing.attach import write_report_and_card

    report = read_report(checkpoint)
    others = {p: hashed for p, hashed in report.files.items() if not p.startswith(f"{FOLDER}/")}
    report = report.model_copy(update={"onnx": OnnxRecord.model_validate(entry), "files": others})
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
