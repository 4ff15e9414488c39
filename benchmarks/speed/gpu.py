"""Random-weight models of full size on a GPU, in bfloat16: times, and shares of the bandwidth and arithmetic that it has.

    python -m benchmarks.speed.gpu [--parts A,B] [--rounds 3] [--minutes 9] [--folder DIR] [--results DIR] [--rehearse]

LLaVA-1.5-7B, and at the end the shape of LLaVA-1.6-34B. Every part ends by itself: an error is recorded and the next part runs;
after `--minutes` no further part begins. Results are written part by part to results/gpu-NAME.json, where those of other parts
stay, and as a table to gpu-NAME.md. The limits are measured in the same run. `--rehearse`: small models, on any device and into
a temporary folder, so that no GPU's time is spent on mistakes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from in_memory import calibrated_copy

from benchmarks.scale.seven_billion import write_calibration
from benchmarks.speed.directions import some_prompts, ways
from benchmarks.speed.gpu_table import table
from benchmarks.speed.replies import OTHERS, Replies
from benchmarks.support.models import FULL, LARGE, Size, model, processor
from benchmarks.support.side_by_side import RESULTS, seconds
from exporter.directions.activations import by_length
from exporter.models.base import resolve
from exporter.models.loading import load_vlm
from exporter.models.recipe import load_recipe
from exporter.models.vlm import VLM
from exporter.pipeline.export import export
from exporter.pipeline.plan import ExportOptions, make_plan, plan_needs
from exporter.runtime.batches import release

RECIPE = load_recipe("llava")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    size: Size = FULL
    large: Size = LARGE
    prompts: int = 512
    large_prompts: int = 128
    tokens: int = 128  # of a reply
    captions: tuple[int, ...] = (64, 128)
    batches: tuple[int, ...] = (1, 8, 32)
    copied: int = 1 << 32  # bytes
    matrix: int = 8192
    calibration: str | None = "builtin"


_TINY = Size(128, 4, 2, 256, 8192, 56, 64, 2)
REHEARSAL = Scale(_TINY, replace(_TINY, kv_heads=1), 24, 16, 6, (3, 6), (1, 2), 1 << 20, 256, None)


@dataclass
class Bench:
    """Models and limits that parts have in common; made when they are first needed."""

    scale: Scale
    device: torch.device
    rounds: int
    folder: Path
    limits: dict[str, float] = field(default_factory=dict)

    @cached_property
    def stock(self) -> VLM:
        return VLM(made(self.scale.size, self.device), processor(self.scale.size.image))

    @cached_property
    def calibrated(self) -> VLM:
        return calibrated(self.stock)

    @cached_property
    def base(self) -> Path:
        """The stock model as a checkpoint on disk."""
        folder = self.folder / "base"
        self.stock.model.save_pretrained(folder)
        self.stock.processor.save_pretrained(folder)
        return folder

    def forget(self) -> None:
        """Give the models' memory back."""
        for name in ("stock", "calibrated"):
            self.__dict__.pop(name, None)
        release()


def made(size: Size, device: torch.device) -> Any:
    return model(size, device=device, dtype=torch.bfloat16)


def calibrated(stock: VLM) -> VLM:
    depth = len(stock.decoder_layers)
    return calibrated_copy(stock, RECIPE, tuple(range(depth // 3, depth // 3 + min(3, depth // 3 + 1))))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    synchronise()
    start = time.perf_counter()
    result = run()
    synchronise()
    return result, time.perf_counter() - start


def peak(run: Callable[[], Any]) -> int:
    """Bytes that tensors on the GPU take at most while `run` runs, above those before; 0 on a CPU."""
    if not torch.cuda.is_available():
        run()
        return 0
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def medians(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds(ways, rounds).items()}


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def limits(bench: Bench) -> dict[str, Any]:
    """A copy on the device, bytes read and written, and a product of bfloat16 matrices: what can be had."""
    source = torch.randn(bench.scale.copied // 2, device=bench.device, dtype=torch.bfloat16)
    target, n = torch.empty_like(source), bench.scale.matrix
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    times = 10
    found = medians(
        {"copy": lambda: [target.copy_(source) for _ in range(times)], "matrices": lambda: [a @ b for _ in range(times)]}, 5
    )
    bench.limits = {
        "bytes_a_second": times * 2 * source.numel() * 2 / found["copy"],
        "operations_a_second": times * 2 * n**3 / found["matrices"],
    }
    return bench.limits


def making(bench: Bench) -> dict[str, Any]:
    """Weights made on the device, and written to disk."""
    bench.forget()
    _, making_ = timed(lambda: bench.stock)
    _, writing = timed(lambda: bench.base)
    return {"seconds_making": making_, "seconds_writing": writing, "parameters": parameters(bench.stock.model)}


def directions(bench: Bench) -> dict[str, Any]:
    return reading(bench, bench.stock, some_prompts(bench.scale.prompts))


def reading(bench: Bench, vlm: VLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Last-token activations of all layers, as the package reads them, against the bare backbone and the reference procedure."""
    work = ways(vlm, prompts)
    memory = {name: peak(way) for name, way in work.items()}
    found = medians(work, bench.rounds)
    layers = vlm.decoder_layers
    weights, hidden = parameters(layers), vlm.model.config.get_text_config().hidden_size
    tokens = sum(map(len, prompts))
    attention = 2 * len(layers) * hidden * sum(len(p) ** 2 for p in prompts)
    operations = 2 * tokens * weights + attention
    passes = len(by_length(prompts, [len(p) for p in prompts], None, vlm.device))
    return {
        "prompts": len(prompts), "tokens": tokens, "seconds": found, "bytes_above_weights": memory,
        "time_to_bare": found["ours"] / found["bare"],
        "speed_to_reference": found["reference"] / found["ours"],
        "memory_to_bare": memory["ours"] / max(1, memory["bare"]),
        "memory_of_reference": memory["reference"] / max(1, memory["ours"]),
        "tokens_a_second": tokens / found["ours"],
        "share_of_operations": shared(bench, "operations_a_second", operations / found["ours"]),
        "share_of_bandwidth": shared(bench, "bytes_a_second", 2 * weights * passes / found["ours"]),
    }  # fmt: skip


def shared(bench: Bench, limit: str, found: float) -> float | None:
    """Of a limit; None where the limits were not measured."""
    return found / bench.limits[limit] if limit in bench.limits else None


#: What does not depend on the caption's length, or hardly.
ONCE = ("plain", "plain_prefill", "static", "static_prefill", "text", "caption_kept", "cache_kept")
EACH = ("plain_caption", "text_pass", "exact", "reference_procedure")


def replies(bench: Bench, batch: int) -> dict[str, Any]:
    """Replies to `batch` questions, each about an image of its own, with short and long captions."""
    asked = {caption: questions(bench.scale, bench.calibrated, bench.stock, batch, caption) for caption in bench.scale.captions}
    longest = asked[max(asked)]
    work: dict[str, Callable[[], Any]] = {name: settled(longest, name) for name in ONCE}
    work |= {f"{name} {caption}": settled(one, name) for caption, one in asked.items() for name in EACH}
    found = medians(work, bench.rounds if batch == 1 else max(1, bench.rounds - 1))
    return compared(found, bench.scale) | {
        "batch": batch,
        "prompt_tokens": longest.inputs["input_ids"].shape[1],
        "bytes_above_weights": {name: peak(settled(longest, name)) for name in ("plain", "exact")},
        "decode_share_of_bandwidth": shared(bench, "bytes_a_second", read_a_second(bench, longest, found)),
    }


def questions(scale: Scale, vlm: VLM, stock: VLM, batch: int, caption: int) -> Replies:
    texts = list(itertools.islice(itertools.cycle(OTHERS), batch))
    return Replies(vlm, stock.model, scale.tokens, texts, caption)


def settled(asked: Replies, name: str) -> Callable[[], Any]:
    """A way of answering with the caption length of its own: others share the model's settings."""

    def run() -> Any:
        for one in (asked.model, asked.stock):
            one.generation_config.min_new_tokens = asked.caption
        return getattr(asked, name)()

    return run


def compared(found: dict[str, float], scale: Scale) -> dict[str, Any]:
    """Ratios to a plain reply, and of the exact method to the ideal: plain, caption decoded, text-only prompt read."""
    plain, prefill = found["plain"], found["plain_prefill"]
    ideal = {c: plain + found[f"plain_caption {c}"] - prefill + found[f"text_pass {c}"] for c in scale.captions}
    return {
        "seconds": found,
        "to_plain": {name: time_ / plain for name, time_ in found.items()},
        "ideal_to_plain": {c: time_ / plain for c, time_ in ideal.items()},
        "exact_to_ideal": {c: found[f"exact {c}"] / time_ for c, time_ in ideal.items()},
        "reference_to_exact": {c: found[f"reference_procedure {c}"] / found[f"exact {c}"] for c in scale.captions},
        "static_decode_to_plain": (found["static"] - found["static_prefill"]) / (plain - prefill),
        "milliseconds_a_step": 1000 * (plain - prefill) / (scale.tokens - 1),
    }


def read_a_second(bench: Bench, asked: Replies, found: dict[str, float]) -> float:
    """Bytes of weights and of keys and values that plain decode steps read in a second."""
    config = asked.stock.config.get_text_config()
    batch, prompt = asked.inputs["input_ids"].shape
    head = config.hidden_size // config.num_attention_heads
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes a token
    steps = asked.tokens - 1
    weights = 2 * parameters(asked.stock.model.language_model.layers, asked.stock.lm_head)
    return steps * (weights + batch * (prompt + steps / 2) * kept) / (found["plain"] - found["plain_prefill"])


def attention(bench: Bench) -> dict[str, Any]:
    """Kinds of attention; replies of the first caption length."""
    found: dict[str, Any] = {}
    asked = questions(bench.scale, bench.calibrated, bench.stock, 1, bench.scale.captions[0])
    for kind in ("sdpa", "eager", "flash_attention_2"):
        if kind.startswith("flash") and find_spec("flash_attn") is None:
            found[kind] = "flash_attn is not installed"
            continue
        with implemented(kind, asked.stock, asked.model):
            found[kind] = medians({n: settled(asked, n) for n in ("plain", "plain_prefill", "static", "exact")}, bench.rounds)
    return found


@contextmanager
def implemented(kind: str, *models: Any) -> Any:
    kept = [m.config.get_text_config()._attn_implementation for m in models]
    for one in models:
        one.set_attn_implementation(kind)
    try:
        yield
    finally:
        for one, before in zip(models, kept, strict=True):
            one.set_attn_implementation(before)


def exported(bench: Bench) -> dict[str, Any]:
    """The whole flow on the last three layers, verified in a fresh process; its stages, and memory against what the plan says."""
    base, depth = bench.base, bench.scale.size.layers
    calibration = bench.scale.calibration or str(write_calibration(bench.folder / "calibration.jsonl"))
    plan = make_plan(
        str(base),
        ExportOptions.of(
            output=bench.folder / "calibrated", layers=f"{depth - 3}-{depth - 1}", calibration=calibration, force=True
        ),
    )
    bench.forget()
    memory = peak(lambda: export(plan))
    report = json.loads((plan.output / "shiftdc_report.json").read_text("utf-8"))
    return {
        "seconds": report["seconds"], "parity": report["parity"], "bytes": memory, "bytes_said": plan_needs(plan).report(),
    }  # fmt: skip


def four_bit(bench: Bench) -> dict[str, Any]:
    """Directions of a model quantised while it is loaded."""
    if find_spec("bitsandbytes") is None:
        return {"left_out": "bitsandbytes is not installed"}
    base = bench.base
    bench.forget()
    loaded: list[VLM] = []
    memory = peak(lambda: loaded.append(load_vlm(resolve(str(base)), RECIPE, quantised=4)))
    plan = make_plan(str(base), ExportOptions.of(output=bench.folder / "four", layers="0", load_in_4bit=True))
    prompts = some_prompts(bench.scale.prompts)
    found = medians({"ours": ways(loaded[0], prompts)["ours"]}, bench.rounds)
    return {"bytes_loading": memory, "bytes_said": plan_needs(plan).report(), "seconds": found, "prompts": len(prompts)}


def offloaded(bench: Bench) -> dict[str, Any]:
    """Directions with half of the layers in the CPU's memory, as `--device-map auto` leaves them where a GPU is too small."""
    base, depth = bench.base, bench.scale.size.layers
    bench.forget()
    here = bench.device.type if bench.device.type == "cpu" else 0
    places = {"model.vision_tower": here, "model.multi_modal_projector": here, "lm_head": here}
    inner = {f"model.language_model.layers.{i}": here if i < depth // 2 else "cpu" for i in range(depth)}
    outer = {f"model.language_model.{name}": here for name in ("embed_tokens", "norm", "rotary_emb")}
    loaded: list[VLM] = []
    options: Any = {"device_map": {**places, **inner, **outer}, "offload": bench.folder / "offload"}
    memory = peak(lambda: loaded.append(load_vlm(resolve(str(base)), RECIPE, **options)))
    prompts = some_prompts(bench.scale.prompts)
    found: dict[str, float] = {}
    running = peak(lambda: found.update(medians({"ours": ways(loaded[0], prompts)["ours"]}, 1)))
    return {"bytes_loading": memory, "bytes_running": running, "seconds": found, "prompts": len(prompts)}


def compiled(bench: Bench) -> dict[str, Any]:
    """A static cache, with which generate() compiles the decode steps by itself on CUDA."""
    asked = questions(bench.scale, bench.calibrated, bench.stock, 1, bench.scale.captions[0])
    options = {**asked.length, "cache_implementation": "static"}

    def of(reference: str) -> Any:
        asked.use(reference)
        return asked.model.generate(**asked.inputs, **options)

    first = {}
    work: dict[str, Callable[[], Any]] = {
        "plain": lambda: asked.stock.generate(**asked.inputs, **options),
        "plain_prefill": lambda: asked.stock.generate(**asked.inputs, **asked.one),
        "static": lambda: of("static"),
        "exact": lambda: of("caption"),
    }
    for name, way in work.items():
        _, first[name] = timed(way)
    found = medians(work, bench.rounds)
    return {
        "seconds": found, "seconds_first": first, "caption": asked.caption,
        "to_plain": {name: time_ / found["plain"] for name, time_ in found.items()},
        "decode_share_of_bandwidth": shared(bench, "bytes_a_second", read_a_second(bench, asked, found)),
    }  # fmt: skip


def large(bench: Bench) -> dict[str, Any]:
    """The 34B, made on the device and never on disk: directions and replies."""
    bench.forget()
    making_model = timed(lambda: made(bench.scale.large, bench.device))
    stock = VLM(making_model[0], processor(bench.scale.large.image))
    found: dict[str, Any] = {"seconds_making": making_model[1], "parameters": parameters(stock.model)}
    found["directions"] = reading(bench, stock, some_prompts(bench.scale.large_prompts))
    caption = bench.scale.captions[0]
    scale = replace(bench.scale, tokens=caption, captions=(caption,))
    asked = questions(scale, calibrated(stock), stock, 1, caption)
    names = (*ONCE, *EACH)
    times = medians({n if n in ONCE else f"{n} {caption}": settled(asked, n) for n in names}, max(1, bench.rounds - 1))
    share = shared(bench, "bytes_a_second", read_a_second(bench, asked, times))
    return {**found, "replies": compared(times, scale) | {"batch": 1, "decode_share_of_bandwidth": share}}


def parts(scale: Scale) -> dict[str, Callable[[Bench], dict[str, Any]]]:
    """In the order in which they run: what matters most first, and what takes the models away last."""
    return {
        "limits": limits,
        "making": making,
        "directions": directions,
        **{f"replies {batch}": lambda bench, batch=batch: replies(bench, batch) for batch in scale.batches},
        "attention": attention,
        "compiled": compiled,
        "export": exported,
        "four bit": four_bit,
        "offloaded": offloaded,
        "large": large,
    }


@torch.no_grad()
def run(bench: Bench, chosen: list[str], file: Path, minutes: float) -> None:
    """Every part, written as soon as it is done; one that fails leaves its error and the rest as they are."""
    about = {"device": device_name(bench.device), "torch": torch.__version__, "rounds": bench.rounds}
    results = json.loads(file.read_text("utf-8")) if file.exists() else {"parts": {}}
    bench.limits = results["parts"].get("limits", {})
    start = time.monotonic()
    for name in chosen:
        began = time.monotonic()
        late = began - start > 60 * minutes
        found = {"left_out": f"after {minutes:g} minutes no part begins"} if late else tried(name, bench)
        spent = round(time.monotonic() - began, 1)
        if not late or name not in results["parts"]:  # what was measured before stays
            results["parts"][name] = {**found, "seconds_in_all": spent}
        write({**about, **results}, file)
        print(f"{name}: {found.get('error') or found.get('left_out') or 'done'} in {spent:.0f} s", flush=True)
    print(file.with_suffix(".md").read_text("utf-8"))


def tried(name: str, bench: Bench) -> dict[str, Any]:
    try:
        return parts(bench.scale)[name](bench)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other parts are worth having)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    finally:
        release()


def write(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    file.with_suffix(".md").write_text(table(json.loads(file.read_text("utf-8"))), "utf-8")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="names, separated by commas [default: all]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, help="for checkpoints [default: a temporary one]")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.rehearse:
        sys.exit("benchmarks/speed/gpu.py needs a CUDA GPU with 80 GB, and there is none; nothing was measured. Try --rehearse.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = REHEARSAL if arguments.rehearse else Scale()
    chosen = arguments.parts.split(",") if arguments.parts else list(parts(scale))
    if unknown := [name for name in chosen if name not in parts(scale)]:
        sys.exit(f"--parts: there is none named {unknown[0]!r}, expected of {', '.join(parts(scale))}.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = Path(folder) if arguments.rehearse else arguments.results
        file = results / f"gpu-{device_name(device).replace(' ', '-')}.json"
        run(Bench(scale, device, arguments.rounds, Path(folder)), chosen, file, arguments.minutes)


if __name__ == "__main__":
    main()
