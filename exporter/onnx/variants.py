"""Smaller graphs from the float32 ones: int8 and 4-bit weights of matrix products, as transformers.js names them.

Only products with a constant matrix are touched. The correction has none (its dot product is a multiplication and a sum), so it
stays in float32; ONNX Runtime's other quantisers would drop the optional inputs' defaults.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.onnx.files import save_graph
from exporter.onnx.interface import DECODER, OPTIONAL, VISION, graph_file

if TYPE_CHECKING:
    import onnx_ir as ir

#: Weights that share a scale in 4-bit graphs.
BLOCK = 32


def write_int8(folder: Path) -> None:
    """Vision encoder and decoder with 8-bit weights, a scale for each column; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for graph in (VISION, DECODER):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".int8-") as scratch:
            out = Path(scratch) / "graph.onnx"
            with _quiet():
                quantize_dynamic(
                    folder / graph_file(graph, "fp32"),
                    out,
                    op_types_to_quantize=["MatMul"],
                    weight_type=QuantType.QUInt8,
                    per_channel=True,
                    use_external_data_format=True,
                )
            _keep(out, folder / graph_file(graph, "int8"))


def write_q4(folder: Path) -> None:
    """Vision encoder and decoder with 4-bit weights in blocks; activations stay float32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for graph in (VISION, DECODER):
        model = onnx.load(folder / graph_file(graph, "fp32"))
        with _quiet(), tempfile.TemporaryDirectory(dir=folder, prefix=".q4-") as scratch:
            quantizer = MatMulNBitsQuantizer(model, block_size=BLOCK, is_symmetric=True)
            quantizer.process()
            out = Path(scratch) / "graph.onnx"
            quantizer.model.save_model_to_file(str(out), use_external_data_format=True)
            _keep(out, folder / graph_file(graph, "q4"))


def _keep(made: Path, file: Path) -> None:
    """Write the graph that a quantiser made under its name, with its optional inputs still there."""
    import onnx_ir as ir

    exported = ir.external_data.load_to_model(ir.load(made))
    _check_optional(exported)
    save_graph(exported, file)


def _check_optional(exported: ir.Model) -> None:
    inputs = {value.name for value in exported.graph.inputs}
    lost = [name for name in OPTIONAL if name in inputs and name not in exported.graph.initializers]
    assert not lost, f"a quantiser removed the default of {lost}"


class _quiet:  # noqa: N801 (a context manager)
    """ONNX Runtime's quantisers report every layer."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
