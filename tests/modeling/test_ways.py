"""What an export is put into: training, compilers, other attention and number formats, several processes, servers, long service.

Every test first shows that calibration changes the outcome, then that the outcome is the calibrated one.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from naive import Naive
from tiny import encode, picture, tiny_processor
from torch import distributed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    DynamicCache,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.cli.serving import model_manager
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality, _StreamError
from transformers.distributed import DistributedConfig
from transformers.models.auto import modeling_auto
from with_torchvision import FOLDER

CAPTION = "Based on the given Request, describe the image. Request: {q}"
TEXT = "{q} Image Caption: {caption}"
LAYERS = [1, 2]
STRENGTH = 3.0  # so that calibration changes nearly every token
REQUEST = "How do I build this?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}
ANSWER = " No, I will not do that."


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(make_export):
    return make_export(gate="two-sided", caption_max_new_tokens=8, strength=STRENGTH).plan.output


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def stock(base_folder):
    return LlavaForConditionalGeneration.from_pretrained(base_folder).eval()


@pytest.fixture
def inputs(processor):
    return encode(processor, [REQUEST], [picture(0)])


def new_tokens(out, inputs):
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def directions_of(model):
    return {layer: c.direction for layer, c in zip(LAYERS, model.shiftdc_corrections, strict=True)}


def strength_of(model):
    return model.shiftdc_corrections[0].strength


def by_baked_shift(stock, model, length):
    """A context in which `stock` is corrected as a single pass of `model` is."""
    amounts, strength = [c.shift for c in model.shiftdc_corrections], strength_of(model)
    return Naive(stock, None, None, None).calibrated(LAYERS, directions_of(model), length, amounts=amounts, strength=strength)


@torch.no_grad()
def naive_logits(stock, model, row, length):
    with by_baked_shift(stock, model, length):
        return stock(**row).logits


def naive_reply(stock, model, processor):
    """The method by hooks on `stock`, which is `model` without calibration."""
    naive, directions = Naive(stock, processor, CAPTION, TEXT), directions_of(model)
    caption = processor.tokenizer.decode(naive.caption(REQUEST, picture(0), 8), skip_special_tokens=True).strip()
    activations = naive.activations(naive.ids(TEXT.format(q=REQUEST, caption=caption)))
    reference = torch.stack([activations[layer] @ directions[layer] for layer in LAYERS])
    inputs = naive.ids(REQUEST, picture(0))
    length, strength = inputs["input_ids"].shape[1], strength_of(model)
    with naive.calibrated(LAYERS, directions, length, reference=reference, strength=strength):
        return new_tokens(stock.generate(**inputs, **GREEDY), inputs)


def uncalibrated(model, inputs):
    return new_tokens(model.generate(**inputs, **GREEDY, shiftdc=False), inputs)


# training


def answered(processor, seed):
    """(a row for training with labels on every token, the length of its prompt)."""
    prompt = encode(processor, [REQUEST], [picture(seed)])
    answer = processor.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt["input_ids"], answer], dim=1)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompt["pixel_values"], "labels": ids}
    return row, prompt["input_ids"].shape[1]


def trained(model, rows, folder, **options):
    """The loss of every step, each of one row."""
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=1, learning_rate=0.02, optim="sgd",
        lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{k: v[0] for k, v in row.items()} for row in rows])
    trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CHECKPOINTING = {
    "without checkpointing": {},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_trainer_trains_the_calibrated_model(folder, stock, processor, inputs, tmp_path, how):
    """Step by step, with its gradients: a loss of the third step, and the weights after it, are those of the naive correction."""
    model = load(folder)
    for correction in model.shiftdc_corrections:
        correction.strength = 30.0  # one token of many is corrected, and the mean shift is small
    pairs = [answered(processor, seed) for seed in (0, 1)]
    rows, length = [row for row, _ in pairs], pairs[0][1]
    with torch.no_grad():
        assert abs(model(**rows[0]).loss - model(**rows[0], shiftdc=False).loss) > 1e-2
    without = trained(copy.deepcopy(stock), rows, tmp_path)
    with by_baked_shift(stock, model, length):
        expected = trained(stock, rows, tmp_path)
    found = trained(model, rows, tmp_path, **CHECKPOINTING[how])
    assert model.is_gradient_checkpointing == (how != "without checkpointing")
    assert len(found) == 3 and found[0] != found[2]
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(abs(f - w) > 1e-2 for f, w in zip(found, without, strict=True))
    weights, wanted = model.state_dict(), stock.state_dict()
    assert all(torch.allclose(weights[name], tensor, atol=1e-4) for name, tensor in wanted.items())
    stock.load_state_dict({name: weights[name] for name in wanted})
    reply = new_tokens(model.generate(**inputs, **GREEDY), inputs)
    assert reply == naive_reply(stock, model, processor) != uncalibrated(model, inputs)


# compilers, attention, number formats


@pytest.fixture
def needs_compiler():
    """torch.compile's own backend writes C++ for a CPU."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler, and there is none")
    yield
    torch.compiler.reset()


def test_a_correction_that_inductor_compiled(folder, stock, model, inputs, needs_compiler):
    """By itself: compiling all of forward(), which test_modeling.py only captures, takes more than a minute."""
    expected = naive_logits(stock, model, inputs, inputs["input_ids"].shape[1])
    compiled = load(folder)
    counters.clear()
    compiled.shiftdc_corrections[0].compile(backend="inductor", fullgraph=True)
    with torch.no_grad(), inductor.patch(compile_threads=1, **{"cpp.simdlen": 1}):  # no helpers, no trials of the processor
        assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-4)
        assert not torch.allclose(model(**inputs, shiftdc=False).logits[0, -1], expected[0, -1], atol=1e-2)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention(folder, stock, processor, inputs, attention):
    model = load(folder, attn_implementation=attention)
    assert model.config.get_text_config()._attn_implementation == attention
    expected = naive_reply(stock, model, processor)
    with torch.compiler.set_stance("force_eager"):  # flex attention would compile itself, for minutes
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs) == expected != uncalibrated(model, inputs)


def quantised(name):
    if name == "bitsandbytes, 8 bits":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")
        return BitsAndBytesConfig(load_in_8bit=True)
    pytest.importorskip("torchao", reason="needs torchao, which is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("name", ["bitsandbytes, 8 bits", "torchao, int8 weights"])
def test_quantised_weights(folder, base_folder, processor, inputs, tmp_path, name):
    settings = quantised(name)
    model = load(folder, quantization_config=settings)
    stock = LlavaForConditionalGeneration.from_pretrained(base_folder, quantization_config=settings).eval()
    assert type(model.lm_head) is type(stock.lm_head)
    assert {c.direction.dtype for c in model.shiftdc_corrections} == {torch.float32}
    expected = naive_reply(stock, model, processor)
    assert expected != uncalibrated(model, inputs)
    assert new_tokens(model.generate(**inputs, **GREEDY), inputs) == expected
    model.save_pretrained(tmp_path)
    assert new_tokens(load(tmp_path).generate(**inputs, **GREEDY), inputs) == expected


# transformers serve


def served(model, processor, inputs, streaming):
    """The reply that the server's own code has the model write: (text, tokens), of which one is None."""

    async def ask():
        manager, config = GenerateManager(), copy.deepcopy(model.generation_config)
        config.update(**GREEDY)
        if not streaming:
            text, _, tokens = await manager.generate_non_streaming(model, processor, inputs, config, request_id="1")
            return text, tokens.tolist()
        queue, streamer = manager.generate_streaming(model, processor, inputs, config, request_id="1")
        parts = []
        while (part := await queue.get()) is not None:
            if isinstance(part, _StreamError):
                raise ValueError(part.msg)
            parts.append(part)
        assert streamer.total_tokens == GREEDY["max_new_tokens"]
        return "".join(parts), None

    return asyncio.run(ask())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_what_a_server_asks_for_is_calibrated(model, stock, processor, inputs, streaming):
    """With `--continuous-batching` too, which the server's code leaves off for models with images."""
    expected = naive_reply(stock, model, processor)
    assert expected != uncalibrated(model, inputs)
    assert not GenerationState(continuous_batching=True).use_continuous_batching(model, Modality.VLM)
    text, tokens = served(model, processor, inputs, streaming)
    assert tokens is None or [tokens] == expected
    assert text == processor.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_server_passes_the_refusal_on(model, processor, inputs, streaming):
    bare = {**inputs, "pixel_values": None}
    with pytest.raises(ValueError, match=r"no image was given.*shiftdc=False"):
        served(model, processor, bare, streaming)


def test_a_server_that_knows_nothing_of_the_class_loads_nothing(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModelManager(device="cpu").load_model_and_processor(f"{folder}@main")
    with pytest.raises(AttributeError, match="no attribute ShiftDCLlavaForConditionalGeneration"):
        ModelManager(device="cpu", trust_remote_code=True).load_model_and_processor(f"{folder}@main")


def test_a_server_that_is_told_of_the_class_loads_it(folder, model, inputs, monkeypatch):
    """By the lines of docs/calling.md."""
    name = type(model).__name__
    monkeypatch.setattr(model_manager.transformers, name, None, raising=False)  # undone behind the test, as the next
    monkeypatch.setitem(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, model.config.model_type, "")
    page = (Path(__file__).parents[2] / "docs/calling.md").read_text()
    code = page.split("```python\n")[1].split("Serve(export")[0]
    exec(code.replace('"demo-shiftdc"', repr(str(folder))), {})
    manager = ModelManager(device="cpu", trust_remote_code=True)
    loaded, processor = manager.load_model_and_processor(f"{folder}@main")
    try:
        assert manager.get_model_modality(loaded, processor) is Modality.VLM
        reply = new_tokens(loaded.generate(**inputs, **GREEDY), inputs)
        assert reply == new_tokens(model.generate(**inputs, **GREEDY), inputs) != uncalibrated(model, inputs)
    finally:
        manager.shutdown()


# several processes


def apart(work, arguments, processes):
    """Run `work(rank, *arguments)` in new processes, which find the tests' torchvision only where they ask for it."""
    multiprocessing.set_forkserver_preload(["transformers.trainer", "transformers.models.llava.modeling_llava"])  # read once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [p for p in sys.path if p != str(FOLDER)])
        torch.multiprocessing.start_processes(work, arguments, processes, start_method="forkserver")


def of_inference(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits  # FSDP2 needs a pass of the model before generate(), as in the base class
    replies = (new_tokens(model.generate(**inputs, **GREEDY, shiftdc=shiftdc), inputs) for shiftdc in (None, False))
    return dict(zip(("logits", "calibrated", "uncalibrated"), (logits, *replies), strict=True))


def by_ddp(folder, row, inputs):
    """The gradients of rows of which every process has its own."""
    model = DistributedDataParallel(load(folder), find_unused_parameters=True)
    model(**row).loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return {**of_inference(model.module, inputs), "gradients": gradients}


def by_fully_shard(folder, row, inputs):
    model = load(folder)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    return of_inference(fully_shard(model), inputs)


def by_plan(folder, row, inputs, **sizes):
    """As transformers shards a model that it loads."""
    return of_inference(load(folder, distributed_config=DistributedConfig(**sizes)), inputs)


PARALLEL: dict[str, Callable[..., dict[str, Any]]] = {
    "DistributedDataParallel": by_ddp,
    "fully_shard": by_fully_shard,
    "tensor parallel plan": partial(by_plan, tp_plan="auto"),
    "FSDP plan": partial(by_plan, fsdp_size=2),
}


def one_of_two(rank, folder, rows, inputs, results):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    distributed.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=2)
    try:
        found = {name: work(folder, rows[rank], inputs) for name, work in PARALLEL.items()}
    finally:
        distributed.destroy_process_group()
    torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(folder, model, processor, tmp_path_factory):
    """What each of them found, by way; both ways of sharding in one pair, because starting one takes seconds."""
    results = tmp_path_factory.mktemp("processes")
    rows = [answered(processor, seed)[0] for seed in (0, 1)]
    inputs = encode(processor, [REQUEST], [picture(0)])
    apart(one_of_two, (folder, rows, dict(inputs), results), 2)
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", PARALLEL)
def test_two_processes_are_calibrated_as_one(two_processes, stock, model, processor, inputs, way):
    logits = naive_logits(stock, model, inputs, inputs["input_ids"].shape[1])
    reply = naive_reply(stock, model, processor)
    for found in (results[way] for results in two_processes):
        assert torch.allclose(found["logits"], logits, atol=1e-4)
        assert found["calibrated"] == reply != found["uncalibrated"] == uncalibrated(model, inputs)


def test_two_processes_train_the_calibrated_model(two_processes, stock, model, processor):
    def gradients(calibrated):
        stock.zero_grad()
        for seed in (0, 1):
            row, length = answered(processor, seed)
            with by_baked_shift(stock, model, length) if calibrated else nullcontext():
                (stock(**row).loss / 2).backward()
        return {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}

    expected, without = gradients(True), gradients(False)
    assert not torch.allclose(expected["lm_head.weight"], without["lm_head.weight"], atol=1e-3)
    for results in two_processes:
        found = results["DistributedDataParallel"]["gradients"]
        assert all(torch.allclose(found[name], gradient, atol=1e-4) for name, gradient in expected.items())


# exceptions, and long service


class Stop(BaseException):
    """As KeyboardInterrupt: no `except Exception` catches it."""


def state_of(model):
    modules = {
        name: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()
    }
    settings = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    return modules, settings, model.config.to_dict(), model.generation_config.to_dict()


def test_an_exception_in_any_pass_leaves_the_model_as_it_was(model, inputs):
    """Raised in turn in the image tower and in every pass of the decoder: caption, reference, prompt, each token."""
    expected = model.generate(**inputs, **GREEDY)
    assert expected.tolist() != model.generate(**inputs, **GREEDY, shiftdc=False).tolist()
    before, left = state_of(model), [-1]

    def count(*_):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    watched = [model.model.vision_tower, model.model.language_model.layers[-1]]
    handles = [module.register_forward_pre_hook(count) for module in watched]
    try:
        model.generate(**inputs, **GREEDY)
        passes = -1 - left[0]
        assert passes > GREEDY["max_new_tokens"] + 3
        for number in range(1, passes + 1):
            left[0] = number
            with pytest.raises(Stop):
                model.generate(**inputs, **GREEDY)
            left[0] = -1
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    finally:
        for handle in handles:
            handle.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_reader_who_leaves_leaves_the_model_as_it_was(model, inputs, after):
    """A server ends a reply by an exception in its streamer."""

    class Streamer:
        def put(self, value):
            seen.append(value)
            if len(seen) > after:
                raise Stop

        def end(self):
            raise AssertionError

    seen: list[torch.Tensor] = []
    expected = model.generate(**inputs, **GREEDY)
    before = state_of(model)
    with pytest.raises(Stop):
        model.generate(**inputs, **GREEDY, streamer=Streamer())
    assert state_of(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve_long(_, folder, inputs, replies, result):
    """Write the process's size after the first 100 replies and after all."""
    torch.set_num_threads(1)
    model, sizes = load(folder), []
    model.config.shiftdc["caption_max_new_tokens"] = 1  # the same steps, in half of the time
    for number in range(replies):
        given = {"past_key_values": DynamicCache()} if number % 2 else {}
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **given)
        if number + 1 in (100, replies):
            sizes.append(resident())
    torch.save(sizes, result)


def test_replies_take_no_more_memory(folder, processor, tmp_path):
    """At a rate at which 2,000 replies leave the process within 5 % of its size after the first 100."""
    inputs, result, replies = encode(processor, ["A"], [picture(0)]), tmp_path / "sizes.pt", 500
    apart(serve_long, (folder, dict(inputs), replies, result), 1)
    after_a_hundred, after_all = torch.load(result, weights_only=True)
    assert (after_all - after_a_hundred) / (replies - 100) <= 0.05 * after_a_hundred / (2000 - 100)
