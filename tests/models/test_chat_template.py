"""The limit on chat templates: their own computing, never the machine's."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import TEMPLATE, picture, tiny_processor
from transformers import processing_utils

from exporter.checkpoint import verify_worker
from exporter.errors import InputError
from exporter.models import chat_template as templates
from exporter.models.chat_template import encoded, rendered
from exporter.models.vlm import user_turn

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


class Waiting:
    """A tokenizer whose template takes wall time and computes nothing, as any does where the machine is not given."""

    def apply_chat_template(self, conversation, tokenize):
        time.sleep(0.6)
        return "done"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(templates, "LIMIT", 0.3)


def turns(text="Hi"):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def test_waiting_does_not_count():
    assert rendered(Waiting(), turns()) == "done"


def test_other_threads_do_not_count():
    stop = threading.Event()

    def compute():
        matrix = torch.rand(400, 400)  # without the lock
        while not stop.is_set():
            matrix @ matrix

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert rendered(Waiting(), turns()) == "done"
    finally:
        stop.set()
        thread.join()


def test_a_busy_machine_does_not_count():
    """The process is stopped in the midst of a template, as on a machine that gives its time to others."""
    code = (
        "import time\n"
        "from exporter.models import chat_template as templates\n"
        "templates.LIMIT = 0.3\n"
        "class Slow:\n"
        "    def apply_chat_template(self, conversation, tokenize):\n"
        "        print('rendering', flush=True)\n"
        "        end = time.thread_time() + 0.1\n"
        "        while time.thread_time() < end: pass\n"
        "        return 'done'\n"
        "print(templates.rendered(Slow(), []))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "rendering\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "done\n"


def test_a_loop_counts():
    with pytest.raises(InputError, match=r"MODEL: its chat template does not end within 0\.3 seconds of computing"):
        rendered(tiny_processor(LOOP), turns())
    with pytest.raises(InputError, match="--judge: its chat template does not end"):
        rendered(tiny_processor(LOOP).tokenizer, turns(), "--judge", chat_template=LOOP)


def test_a_loop_in_a_batch_with_images_counts():
    with pytest.raises(InputError, match="does not end"):
        encoded(tiny_processor(LOOP), [[user_turn("Hi", picture(0))]], return_tensors="pt")


def test_encoded_is_apply_chat_template_and_renders_once(monkeypatch):
    processor = tiny_processor(TEMPLATE)
    conversations = [[user_turn("Why {{ x }}?", picture(0))], [user_turn("What is it?"), *turns("And  now? \n")]]
    options = {"return_tensors": "pt", "processor_kwargs": {"padding": True, "padding_side": "left"}}
    expected = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    found = encoded(processor, conversations, **options)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    render, templates_rendered = processing_utils.render_jinja_template, []
    monkeypatch.setattr(
        processing_utils,
        "render_jinja_template",
        lambda **given: templates_rendered.append(given["chat_template"]) or render(**given),
    )
    encoded(processor, conversations, **options)
    assert templates_rendered.count(TEMPLATE) == 1


def test_the_process_that_verifies_has_the_same_day():
    """It runs without this package, so that it has the function again."""
    assert inspect.getsource(templates.on_the_day) == inspect.getsource(verify_worker.on_the_day)
