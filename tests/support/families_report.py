"""docs/families.md: the conformance suite on every image-text-to-text type of transformers, type by type.

python tests/support/families_report.py            every type that has no green result of the present code (make families)
python tests/support/families_report.py qwen3_5    these, again too
python tests/support/families_report.py --table    none: the page alone, from the results that are there

Each result is kept when it is there, so that an interrupted run goes on. The exit code is 1 where a type is red.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import transformers

from exporter.models.family_table import FamilyTable, Row
from exporter.models.recipe import Recipe, load_recipe, recipe_names

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
SUITE = "tests/models/test_conformance.py"
#: What a result depends on, beside transformers and the type's recipe.
SOURCES = (
    "exporter/**/*.py", "exporter/**/*.yaml", "tests/support/zoo/*.py", "tests/support/tiny*.py", "tests/support/naive.py",
    "tests/support/family_prompts.py", "tests/support/in_memory.py", "tests/models/test_families.py", SUITE,
)  # fmt: skip
AT_A_TIME = 2
LONGEST = 1800  # seconds of one type, many times what the slowest takes


@dataclass(frozen=True)
class Result:
    """What the suite said of a type.

    code, recipe: hashes of what it depends on. traits: as the export recorded them; empty where there was none.
    """

    code: str
    recipe: str
    passed: int
    skipped: int
    failed: tuple[str, ...]
    traits: Mapping[str, object]

    @property
    def green(self) -> bool:
        return self.passed > 0 and not self.failed

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        if self.green:
            return f"{self.passed} passed{skipped}"
        return f"**red**: {len(self.failed)} failed, {self.passed} passed{skipped}"


Results = dict[str, Result]
Suite = Callable[[str], Result]


def read_results(file: Path) -> Results:
    if not file.exists():
        return {}
    found = json.loads(file.read_text("utf-8"))
    return {name: Result(**{**values, "failed": tuple(values["failed"])}) for name, values in found.items()}


def write_results(results: Results, file: Path) -> None:
    document = {name: asdict(results[name]) for name in sorted(results)}
    file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def code_hash() -> str:
    files = sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)})
    total = hashlib.sha256(transformers.__version__.encode())
    for file in files:
        total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def recipe_hash(model_type: str) -> str:
    return hashlib.sha256(recipes()[model_type].model_dump_json(exclude={"models", "notes", "onnx"}).encode()).hexdigest()[:12]


@cache
def recipes() -> Mapping[str, Recipe]:
    """By model_type."""
    return {recipe.family: recipe for recipe in (load_recipe(name) for name in recipe_names() if name != "demo")}


def outdated(model_types: Iterable[str], results: Results) -> list[str]:
    """Those without a result of the present code."""
    code = code_hash()
    now = {name: (code, recipe_hash(name)) for name in model_types}
    return [name for name, key in now.items() if name not in results or (results[name].code, results[name].recipe) != key]


def run_suite(model_type: str) -> Result:
    """In a process of its own."""
    key = {"code": code_hash(), "recipe": recipe_hash(model_type)}
    with tempfile.TemporaryDirectory() as work:
        report, base = Path(work) / "report.xml", Path(work) / "base"
        options = ["-n", "0", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={base}"]
        environment = {"SHIFTDC_FAMILIES": model_type, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", *options, SUITE]
        try:
            done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return Result(**key, passed=0, skipped=0, failed=(f"it took longer than {LONGEST} s",), traits={})
        if not report.exists():
            return Result(**key, passed=0, skipped=0, failed=(f"pytest ended with exit code {done.returncode}",), traits={})
        return Result(**key, **counts(ElementTree.parse(report)), traits=recorded_traits(base))


def counts(report: ElementTree.ElementTree) -> dict[str, int | tuple[str, ...]]:
    """Tests passed and skipped, and the names of those that failed."""
    outcomes = {case.get("name", ""): {part.tag for part in case} for case in report.iter("testcase")}
    failed = tuple(name for name, tags in outcomes.items() if tags & {"failure", "error"})
    skipped = sum("skipped" in tags for tags in outcomes.values())
    return {"passed": len(outcomes) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def recorded_traits(base: Path) -> dict[str, object]:
    configs = sorted(base.glob("export*/calibrated/config.json"))
    return json.loads(configs[0].read_text("utf-8"))["shiftdc"]["traits"] if configs else {}


def run_all(model_types: Iterable[str], results: Results, file: Path, suite: Suite) -> Results:
    """`results` with those of the types, which are kept as they come."""
    pool = ThreadPoolExecutor(AT_A_TIME)
    running = {pool.submit(suite, name): name for name in model_types}
    try:
        for done in as_completed(running):
            name = running[done]
            results = {**results, name: done.result()}
            write_results(results, file)
            print(f"{name}: {results[name]}", flush=True)
            if not results[name].green:
                print(f"  SHIFTDC_FAMILIES={name} {Path(sys.executable)} -m pytest -n 0 {SUITE}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run starts no more
    return results


def page(table: FamilyTable, results: Results) -> str:
    """docs/families.md."""
    supported = sorted((row for row in table.supported if row.family in table.types), key=lambda row: row.family)
    rows = [family_row(row, table.types[row.family], results.get(row.family)) for row in supported]
    refused = [
        f"| `{name}` | {table.types[name]} | {table.refused[name]} |"
        for name in sorted(table.types.keys() & table.refused.keys())
    ]
    untried = [
        f"| `{name}` | {table.types[name]} | new in transformers: only with `--experimental-family` |" for name in table.untried
    ]
    head = ["| model_type | class | checkpoints | decoder layers | measured | ONNX | checks | to know |", "|" + "---|" * 8]
    parts = [ABOUT, count_line(table, results), "", *head, *rows, "", REFUSED, *refused, *untried, ""]
    return "\n".join(parts)


ABOUT = """# Families

Written by `make families` from the results in `benchmarks/results/families.json`; nothing here is written by hand. The checks
(`tests/models/test_conformance.py`) take a tiny model of the type, with random weights, the whole way: directions and every
reference against hooks on the stock class, composed prompts against the chat template's, bake, verify in a fresh process,
both rules, mixed, left-padded and right-padded batches, conversations that go on in a cache, `shiftdc=False`, saving and
pickling, LoRA on top, and the stock class refused. Published weights are another matter: [published.md](published.md).

"Measured" is what the export found out and recorded in its config.json. ONNX: whether `--onnx` writes graphs. A type that is
not run yet has a recipe, and nothing is claimed for it.
"""
REFUSED = "## Refused\n\nBefore anything is loaded, with this reason.\n\n| model_type | class | why |\n|---|---|---|"


def count_line(table: FamilyTable, results: Results) -> str:
    families = {row.family for row in table.supported} & table.types.keys()
    found = [results[name] for name in families & results.keys()]
    green, states = sum(result.green for result in found), len({result.code for result in found})
    refused = len(table.types.keys() & table.refused.keys())
    return (
        f"transformers {table.transformers} has {len(table.types)} types: {green} green, {len(found) - green} red, "
        f"{len(families) - len(found)} not run yet, {refused} refused, {len(table.untried)} untried. "
        f"The results are of {states} {'state' if states == 1 else 'states'} of the code."
    )


def family_row(row: Row, stock: str, result: Result | None) -> str:
    traits = result.traits if result is not None else {}
    layers = f"`{traits['decoder_layers']}`" if traits else ""
    cells = (
        f"`{row.family}`", stock, ", ".join(row.models), layers, "; ".join(properties(traits)), "yes" if row.onnx else "no",
        "not run yet" if result is None else str(result), " ".join(row.notes),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def properties(traits: Mapping[str, object]) -> Iterator[str]:
    """In words; what most families have is left out."""
    if not traits:
        return
    yield "image read once" if traits["shares_prefix"] else "image read twice"
    if traits["stream_axis"] is not None:
        yield "several residual streams"
    for name, words in {"backbone_state": "kept between passes", "row_inputs": "per row", "token_inputs": "per token"}.items():
        if traits[name]:
            yield f"{words}: {', '.join(f'`{value}`' for value in traits[name])}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args(arguments)
    table, results = FamilyTable.of_installed(), read_results(RESULTS)
    families = sorted({row.family for row in table.supported} & table.types.keys())
    if unknown := set(asked.model_types) - set(families):
        parser.error(f"no supported type: {', '.join(sorted(unknown))}")
    results = {name: result for name, result in results.items() if name in families}
    if not asked.table:
        green = {name: result for name, result in results.items() if result.green}
        results = run_all(asked.model_types or outdated(families, green), results, RESULTS, run_suite)
    PAGE.write_text(page(table, results), "utf-8")
    print(count_line(table, results))
    print(f"{len(outdated(families, results))} types have no result of the present code.")
    return int(bool(table.untried) or not all(result.green for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
