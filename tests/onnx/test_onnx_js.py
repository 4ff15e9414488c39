"""transformers.js, in node and in Chromium, replies as PyTorch does on the demo model."""

from __future__ import annotations

import functools
import json
import re
import runpy
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import Chromium
from javascript import NODE, ROOT, install_packages, needs_node, node, node_module
from PIL import Image

from exporter.checkpoint.open import open_export
from exporter.onnx.runner import OnnxShiftDC

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PER_CELL = 30
NEW_TOKENS = 24
WAYS = ("uncalibrated", "static", "exact")

pytestmark = needs_node
Replies = dict[str, list[str]]


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    install_packages()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Harm in the image, harmless, benign questions about harmful things, and harm in the text: as the example writes them."""
    folder = tmp_path_factory.mktemp("questions")
    runpy.run_path(str(ROOT / "examples" / "demo_questions.py"))["main"](str(folder), str(PER_CELL))
    return folder / "questions.jsonl"


def asked(questions: Path) -> tuple[list[str], list[Image.Image]]:
    lines = list(map(json.loads, questions.read_text("utf-8").splitlines()))
    return [q["prompt"] for q in lines], [Image.open(questions.parent / q["image"]).convert("RGB") for q in lines]


@pytest.fixture(scope="module")
def wanted(demo_onnx: Path, questions: Path) -> Replies:
    """PyTorch's replies in each of the three ways."""
    vlm = open_export(demo_onnx)
    settings, inputs = vlm.model.config.shiftdc, vlm.encode(*asked(questions))
    prompt = inputs["input_ids"].shape[1]
    replies = {}
    for way, reference in zip(WAYS, (None, "static", "caption"), strict=True):
        vlm.model.config.shiftdc = {**settings, "reference": reference or "static"}
        out = vlm.model.generate(**inputs, shiftdc=reference is not None, max_new_tokens=NEW_TOKENS, do_sample=False)
        replies[way] = [text.strip() for text in vlm.tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True)]
    return replies


@pytest.fixture(scope="module")
def node_replies(demo_onnx: Path, questions: Path) -> Callable[..., Replies]:
    def replies(*options: str) -> Replies:
        printed = node("replies.mjs", demo_onnx / "onnx", questions, "--tokens", NEW_TOKENS, *options)
        lines = list(map(json.loads, printed.splitlines()))
        return {way: [line[way] for line in lines] for way in WAYS}

    return replies


def test_the_three_ways_differ(wanted: Replies):
    """Else the tests below would compare nothing."""
    assert len(wanted["exact"]) >= 100
    differ = {a + b: sum(map(str.__ne__, wanted[a], wanted[b])) for a in WAYS for b in WAYS if a < b}
    assert min(differ.values()) >= PER_CELL, differ


@pytest.mark.parametrize("batch", ["1", "4"])
def test_node_replies_as_pytorch(node_replies, wanted, batch):
    """A lone image row without position_ids, `static`, is calibrated."""
    assert node_replies("--batch", batch) == wanted


def test_node_q8_keeps_the_correction(node_replies, wanted, record_property):
    found = node_replies("--batch", "4", "--dtype", "q8")
    agreement = {way: sum(map(str.__eq__, found[way], wanted[way])) for way in WAYS}
    record_property("replies equal to PyTorch's", agreement)
    print(f"q8: replies equal to PyTorch's, of {len(wanted['exact'])}: {agreement}")
    assert min(agreement.values()) >= 0.9 * len(wanted["exact"])


def test_ask_prints_the_three_replies(demo_onnx, questions, wanted):
    """The folder's relative path reads like a repository of the Hub."""
    line = json.loads(questions.read_text("utf-8").splitlines()[0])
    folder = Path(demo_onnx.name) / "onnx"
    printed = node(NODE / "ask.mjs", folder, questions.parent / line["image"], line["prompt"], cwd=demo_onnx.parent)
    found = dict(re.findall(r"^(\w+) +[\d.]+ s  (.*)$", printed, re.M))
    assert found == {"calibrated": wanted["exact"][0], **{way: wanted[way][0] for way in ("static", "uncalibrated")}}


SETTINGS = """
import { RawImage } from "@huggingface/transformers";
import { ShiftDC } from "./shiftdc.mjs";
const [folder, request, ...files] = process.argv.slice(1);
const shiftdc = await ShiftDC.load(folder, { dtype: "fp32", session_options: { intraOpNumThreads: 1 } });
const images = await Promise.all(files.map((file) => RawImage.read(file)));
const requests = files.map(() => request);
const replies = {};
for (const reference of ["caption", "text", "blank", "static", "none"])
  replies[reference] = await shiftdc.replies(requests, images, { reference, max_new_tokens: 24 });
const wrong = await shiftdc.replies(requests, images, { reference: "captoin" }).catch((error) => error.message);
console.log(JSON.stringify({ replies, wrong }));
"""


@pytest.mark.parametrize("rule", ["sequential", "precomputed"])
def test_every_reference_and_rule_replies_as_in_python(demo_onnx, questions, tmp_path, rule):
    """The request holds what looks like a slot of the wording, and what String.replace would expand."""
    for file in (demo_onnx / "onnx").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["shiftdc"]["rule"] = rule
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = "how do i make this? {caption} $&"
    files = sorted(questions.parent.glob("*harm*_image-000[0-3].png"))
    found = json.loads(node_module(SETTINGS, tmp_path, request, *files))
    runner, images = OnnxShiftDC(tmp_path, threads=1), [Image.open(file).convert("RGB") for file in files]
    for reference, replies in found["replies"].items():
        kind = None if reference == "none" else reference
        expected = runner.reply([request] * len(files), images, reference=kind, max_new_tokens=NEW_TOKENS)
        assert replies == expected, reference
    assert "captoin" in found["wrong"]


def test_the_readme_s_lines_are_the_exact_method(demo_onnx, questions, wanted):
    (snippet,) = re.findall(r"```js\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    requests, images = asked(questions)
    number = next(i for i, (a, b) in enumerate(zip(wanted["static"], wanted["exact"], strict=True)) if a != b)
    images[number].save(questions.parent / "picture.png")
    snippet = snippet.replace("./demo-shiftdc/onnx", str(demo_onnx / "onnx")).replace("how do i make this?", requests[number])
    snippet = snippet.replace("picture.png", str(questions.parent / "picture.png"))
    assert node_module(snippet).strip() == wanted["exact"][number]


# The page


@pytest.fixture(scope="module")
def site(demo_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server whose root has the examples and an export, as a clone has after `make demo`."""
    root = tmp_path_factory.mktemp("site")
    (root / "examples").symlink_to(ROOT / "examples")
    (root / "demo-shiftdc").symlink_to(demo_onnx)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


SETTLED = """new Promise((settle) => {
  const look = () => {
    const error = document.querySelector(".error");
    if (error) return settle({ error: error.innerText });
    const replies = document.querySelector(".replies");
    if (replies?.ariaBusy !== "false") return setTimeout(look, 5);
    settle(Object.fromEntries([...replies.children].map((card) => [card.id, card.querySelector(".reply").textContent])));
  };
  look();
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_replies_as_pytorch(site, questions, wanted, tmp_path):
    """In WebAssembly, through the form that a visitor fills."""
    found: Replies = {way: [] for way in WAYS}
    with Chromium(str(CHROMIUM), tmp_path) as browser:
        browser.open(f"{site}/examples/web/?tokens={NEW_TOKENS}")
        assert "error" not in browser.evaluate(SETTLED)
        for line in map(json.loads, questions.read_text("utf-8").splitlines()):
            browser.choose_file("input[type=file]", questions.parent / line["image"])
            browser.evaluate(f"document.querySelector('#prompt').value = {json.dumps(line['prompt'])}")
            browser.evaluate("document.querySelector('form').requestSubmit()")
            replies = browser.evaluate(SETTLED)
            assert "error" not in replies, replies
            for way in WAYS:
                found[way].append(replies[way])
    assert found == wanted


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_says_what_is_missing(site, tmp_path):
    with Chromium(str(CHROMIUM), tmp_path) as browser:
        browser.open(f"{site}/examples/web/?model=/nothing")
        assert "/nothing" in browser.evaluate(SETTLED)["error"]
        assert browser.evaluate("document.querySelector('button').disabled")
