"""results/gpu-NAME.json as a page of tables.

python -m benchmarks.speed.gpu_table FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Part = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Markdown; a part that failed or was left out is named with the reason."""
    known = results["parts"]
    pages = [
        f"# Measured on {results['device']}, torch {results['torch']}, random weights in bfloat16, {results['rounds']} rounds"
    ]
    for name, part in known.items():
        reason = part.get("error") or part.get("left_out")
        show = _SHOWN.get(name.split(" ")[0] if name.startswith("replies") else name, _anything)
        pages.append(f"## {name}\n\n{f'Not measured: {reason}.' if reason else show(part)}")
    return "\n\n".join(pages) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _share(value: float | None) -> str:
    return "limits not measured" if value is None else f"{value:.0%}"


def _limits(part: Part) -> str:
    return (
        f"Copy on the device {part['bytes_a_second'] / 1e12:.2f} TB/s (bytes read and written), product of bfloat16 matrices "
        f"{part['operations_a_second'] / 1e12:.0f} TFLOP/s. Shares below are of these."
    )


def _directions(part: Part) -> str:
    names = {"ours": "shiftdc-export", "bare": "bare backbone, same batches", "reference": "reference procedure"}
    rows = [[names[n], f"{s:.3f} s", f"{part['bytes_above_weights'][n] / 1e9:.2f} GB"] for n, s in part["seconds"].items()]
    return (
        f"{part['prompts']} prompts, {part['tokens']} tokens: {part['tokens_a_second']:.0f} tokens a second, "
        f"{_share(part['share_of_operations'])} of the operations, {_share(part['share_of_bandwidth'])} of the bandwidth. "
        f"{part['time_to_bare']:.3f} x the time of the bare backbone; {part['speed_to_reference']:.2f} x the speed of the "
        f"reference procedure, which takes {part['memory_of_reference']:.1f} x the memory.\n\n"
        + _rows(["way", "time", "memory above the weights"], rows)
    )


def _replies(part: Part) -> str:
    rows = [[name, f"{part['seconds'][name]:.3f} s", f"{ratio:.3f} x"] for name, ratio in part["to_plain"].items()]
    ideal = "; ".join(
        f"caption {c}: exact {part['exact_to_ideal'][c]:.3f} x the ideal ({part['ideal_to_plain'][c]:.2f} x a plain reply), "
        f"reference procedure {part['reference_to_exact'][c]:.2f} x exact"
        for c in part["ideal_to_plain"]
    )
    return (
        f"Batch {part['batch']}; a decode step {part['milliseconds_a_step']:.1f} ms, {_share(part['decode_share_of_bandwidth'])} "
        f"of the bandwidth; static's {part['static_decode_to_plain']:.3f} x a plain one. {ideal}.\n\n"
        + _rows(["way", "time", "to a plain reply"], rows)
    )


def _compiled(part: Part) -> str:
    first = part["seconds_first"]
    rows = [[n, f"{s:.3f} s", f"{part['to_plain'][n]:.3f} x", f"{first[n]:.1f} s"] for n, s in part["seconds"].items()]
    share = _share(part["decode_share_of_bandwidth"])
    return f"Decode steps: {share} of the bandwidth.\n\n" + _rows(["way", "time", "to plain", "first time, with compiling"], rows)


def _large(part: Part) -> str:
    return (
        f"{part['parameters'] / 1e9:.1f} billion parameters, made in {part['seconds_making']:.0f} s.\n\n"
        f"{_directions(part['directions'])}\n\n{_replies(part['replies'])}"
    )


def _anything(part: Part) -> str:
    return _rows(["", ""], [[str(key), _value(value)] for key, value in part.items()])


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_SHOWN: dict[str, Callable[[Part], str]] = {
    "limits": _limits, "directions": _directions, "replies": _replies, "compiled": _compiled, "large": _large,
}  # fmt: skip


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.with_suffix(".md").write_text(table(json.loads(file.read_text("utf-8"))), "utf-8")
