"""The card: what it says of the effect, what it takes over from the base's card, and that nothing quoted changes its meaning."""

# ruff: noqa: RUF001 (the card writes signs of multiplication and dashes)

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard

from exporter.checkpoint.report import PromptsRecord, Report
from exporter.directions.statistics import LayerStatistics
from exporter.evaluation.results_json import read_results
from exporter.models.base import DEMO, BaseCheckpoint
from exporter.models.recipe import Recipe, load_recipe
from exporter.publishing.card import render_card
from exporter.publishing.markdown import code, escaped, python_string
from exporter.publishing.plots import PICTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = load_recipe("llava")
STATISTICS = tuple(LayerStatistics(i, 1.0, 0.99, 5.0, 0.9, 1.0, -1.0, 1.0, 0.5, 0.8, 0.7, 0.2) for i in range(4))
REPORT = Report.parse({
    "base_model": {"id": "org/tiny", "revision": COMMIT, "architecture": "Llava", "shards": {"model.safetensors": "ab" * 32}},
    "recipe": RECIPE.model_dump(),
    "layers": {"chosen": [1, 2], "depth": 4, "criterion": "longest run"},
    "prompts": {"compared": 1008, "different": 0, "not_taken_by_the_template": []},
    "statistics": [vars(s) for s in STATISTICS],
    "files": {},
    "calibration": {
        "name": "builtin", "sha256": "ab" * 32, "images": False,
        "fit_safe": 160, "fit_unsafe": 160, "held_out_safe": 40, "held_out_unsafe": 40,
    },
    "versions": {"shiftdc-export": "0.1.0"},
})  # fmt: skip


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    return BaseCheckpoint("org/tiny", COMMIT, folder, {"model_type": "llava"}, ())


def cell(n, metric, value, interval):
    both = {"asr": None, "asr_ci95": None, "over_refusal": None, "over_refusal_ci95": None, "utility": None}
    return {"n": n, **both, metric: value, f"{metric}_ci95": interval}


def defence(asr, asr_ci, over, over_ci, cost, cells):
    return {
        "n_harmful": 450, "n_benign": 540, "asr": asr, "asr_ci95": asr_ci, "over_refusal": over, "over_refusal_ci95": over_ci,
        "utility": 0.99, "utility_ci95": [0.98, 1.0], "degenerate": 0.0, "cost_ratio": cost, "seconds_per_reply": 0.01 * cost,
        "seconds": {"caption": 0.004, "answer": 0.01}, "by_cell": cells, "by_category": {}, "by_image_kind": {},
    }  # fmt: skip


@pytest.fixture
def results():
    return {
        "benchmark": "demo", "source": "shiftdc-export 0.1.0", "split": "test", "n": 1350, "judge": "prefix",
        "date": "2026-11-21", "checkpoint": {}, "device": "cpu",
        "defences": {
            "shiftdc": defence(0.0222, [0.012, 0.04], 0.0, [0.0, 0.007], 1.52, {
                "harmful_image": cell(450, "asr", 0.0222, [0.012, 0.04]),
                "harmful_text": cell(180, "asr", 0.02, [0.01, 0.05]),
                "harmless_text": cell(180, "over_refusal", 0.01, [0.0, 0.04]),
                "benign_question_harmful": cell(180, "over_refusal", 0.0, [0.0, 0.02]),
            }),
            "direct": defence(1.0, [0.99, 1.0], 0.0, [0.0, 0.007], 1.0, {
                "harmful_image": cell(450, "asr", 1.0, [0.99, 1.0]),
                "harmful_text": cell(180, "asr", 0.02, [0.01, 0.05]),
                "harmless_text": cell(180, "over_refusal", 0.0, [0.0, 0.02]),
                "benign_question_harmful": cell(180, "over_refusal", 0.0, [0.0, 0.02]),
            }),
            "random_direction_0": {"asr": 0.998, "asr_ci95": [0.99, 1.0], "over_refusal": None, "utility": None},
        },
        "paired": {"shiftdc": {
            "asr": {"difference": -0.978, "ci95": [-0.99, -0.96], "p": 0.0},
            "over_refusal": {"difference": 0.0, "ci95": [-0.01, 0.01], "p": 1.0},
            "utility": None,
            "by_cell": {"harmful_text": {"difference": 0.0, "ci95": [-0.01, 0.01], "p": 1.0}},
        }},
    }  # fmt: skip


def render(base, results=None, *, recipe=RECIPE, report=REPORT, repo="tiny-shiftdc", **options):
    found = None if results is None else read_results(results)
    return render_card(base, recipe, report, STATISTICS, repo, found, **options)


def front_matter(card):
    return yaml.safe_load(card.removeprefix("---\n").split("\n---\n")[0])


def body(card):
    return card.split("\n---\n", 1)[1]


def rows(card):
    """{first cell: cells} of all tables."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    return {c[0]: c[1:] for c in cells}


# The effect


def test_a_good_effect_in_figures(base, results):
    card = render(base, results)
    assert "[!WARNING]" not in card
    assert "attack success fell from 100 % to 2.2 % \\[1-4\\]" in body(card)
    found = rows(card)
    assert found["no defence"] == ["100 [99-100]", "0 [0-1]", "99 [98-100]", "1.00 ×"]
    assert found["ShiftDC, as shipped"] == ["2.2 [1-4]", "0 [0-1]", "99 [98-100]", "1.52 ×"]
    assert found["random direction 0"] == ["99.8 [99-100]", "–", "–", "–"]
    assert found["harm in the image"] == ["450", "attack succeeds", "100 [99-100]", "2.2 [1-4]"]
    assert found["harmless text beside a harmful image"] == ["180", "refused", "0 [0-2]", "1 [0-4]"]
    assert list(found).index("no defence") < list(found).index("ShiftDC, as shipped")
    assert "1350 questions (450 attacks and 540 harmless requests in the table), judge `prefix`, measured on 2026-11-21" in card
    assert "shiftdc-export evaluate tiny-shiftdc --benchmark demo --defence all" in card
    assert "2.2 [1-4] % of the attacks of `demo` still succeed" in card
    assert "1.52 × the time of a reply without calibration (caption 0.004 s, answer 0.01 s a reply)" in card
    assert "shiftdc=False" in card


def test_not_measured_is_said_first(base):
    card = render(base)
    assert body(card).lstrip().startswith("> [!WARNING]\n> **The effect of this calibration has not been measured.**")
    assert "## Not measured" in card
    assert "model-index" not in front_matter(card)
    assert "How many attacks still succeed has not been measured." in card


def test_no_effect_is_said_first(base, results):
    results["paired"]["shiftdc"]["asr"] = {"difference": -0.01, "ci95": [-0.03, 0.01]}
    top = body(render(base, results)).lstrip()
    assert top.startswith("> [!WARNING]\n> **This calibration was not shown to lower attack success.**")
    assert "no fall beyond chance" in top.split("\n# ")[0]


def test_harm_is_said_first(base, results):
    results["defences"]["shiftdc"]["by_cell"]["harmless_text"] |= {"over_refusal": 0.31}
    top = body(render(base, results)).lstrip().split("\n# ")[0]
    assert "does harm elsewhere" in top
    assert "Worse in the cell harmless\\_text" in top
    assert "from 0 % to 31 %" in top
    assert all(line.startswith(">") for line in top.strip().splitlines())


def test_the_command_repeats_what_was_asked(base, results):
    results |= {"split": "development", "judge": "keywords", "limit_per_cell": 20}
    command = (
        "shiftdc-export evaluate tiny-shiftdc --benchmark demo --defence all --split development --judge keywords --limit 20"
    )
    assert command in render(base, results)


def test_results_of_the_report_count(base, results):
    assert render(base, report=REPORT.model_copy(update={"evaluation": results})) == render(base, results)


def test_no_number_that_is_none(base, results):
    def spoil(tree, value):
        for key, child in tree.items():
            if isinstance(child, dict):
                spoil(child, value)
            elif isinstance(child, float | list) or child is None:
                tree[key] = value

    for value in (math.nan, math.inf, None, [math.nan, 1.0]):
        spoiled = copy.deepcopy(results)
        spoil(spoiled, value)
        statistics = tuple(LayerStatistics(i, *[math.nan] * 11) for i in range(4))
        card = render_card(base, RECIPE, REPORT, statistics, "x", read_results(spoiled))
        assert not re.search(r"\b(nan|inf|None)\b", card, re.IGNORECASE), value
        assert "AUROC not measured" in card
        assert ModelCard(card).data.eval_results is None


def test_scenario_means(base, results):
    assert "13 scenarios" not in render(base, results)
    means = {"direct": {"mean_13": 0.705, "mean_8": 0.6}, "shiftdc": {"mean_13": 0.436}, "stranger": {"mean_13": 0.1}}
    results["mm_safetybench"] = means
    card = render(base, results)
    assert "| no defence | 70.5 | 60 |" in card
    assert "| ShiftDC, as shipped | 43.6 | – |" in card
    assert "stranger" not in card


def test_pictures_that_are_there(base, results, tmp_path):
    assert "](assets/" not in render(base, results)
    (tmp_path / "out" / "assets").mkdir(parents=True)
    for name in ("cost.png", "layers.png", "stranger.png"):
        (tmp_path / "out" / "assets" / name).touch()
    card = render(base, results, folder=tmp_path / "out")
    assert re.findall(r"!\[(.+)\]\((.+)\)", card) == [(PICTURES[n], f"assets/{n}") for n in ("cost.png", "layers.png")]
    shutil.copytree(tmp_path / "out" / "assets", base.folder / "assets")
    assert render(base, results) == card


def test_a_path_of_ones_own_is_not_published(base, results):
    results["source"] = "/home/somebody/secret/items.jsonl"
    card = render(base, results)
    assert "items.jsonl" in card
    assert "somebody" not in card


# Metadata


def test_metadata_round_trip(base, results):
    card = ModelCard(render(base, results))
    assert card.data.base_model == "org/tiny"
    assert card.data.base_model_relation == "finetune"
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    assert card.data.model_name == "tiny-shiftdc"
    found = {r.metric_type: r for r in card.data.eval_results}
    assert {k: r.metric_value for k, r in found.items()} == {
        "attack_success_rate": 0.0222, "over_refusal_rate": 0.0, "exact_match": 0.99,
    }  # fmt: skip
    asr = found["attack_success_rate"]
    assert (asr.task_type, asr.dataset_name, asr.dataset_type, asr.dataset_split) == (
        "image-text-to-text",
        "demo",
        "demo",
        "test",
    )
    assert asr.metric_args == {"judge": "prefix", "n": 450, "ci95": [0.012, 0.04]}
    again = ModelCard(str(card))
    assert again.data.eval_results == card.data.eval_results
    assert again.data.to_dict() == card.data.to_dict()


def test_a_benchmark_of_the_hub_is_named_with_its_commit(base, results):
    results |= {"benchmark": "mm-safetybench", "source": f"PKU-Alignment/MM-SafetyBench@{COMMIT}, 10 of 20 rows", "split": None}
    result = ModelCard(render(base, results)).data.eval_results[0]
    assert (result.dataset_type, result.dataset_revision) == ("PKU-Alignment/MM-SafetyBench", COMMIT)
    assert result.dataset_split is None


def test_a_base_that_is_not_on_the_hub_is_no_base_model(base):
    for other in (BaseCheckpoint("tiny", None, base.folder, {}, ()), BaseCheckpoint(DEMO, None, base.folder, {}, ())):
        assert not front_matter(render(other)).keys() & {"base_model", "base_model_relation"}


def inherited(base, text):
    (base.folder / "README.md").write_text(text)
    card = render(base)
    ModelCard(card)
    return {k: v for k, v in front_matter(card).items() if k.startswith("licen") or k == "language"}, card


@pytest.mark.parametrize(
    ("yaml_text", "found"),
    [
        ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0", "language": ["en"]}),
        ("license: [mit, llama2]\nlanguage: [en, zh-Hant]", {"license": ["mit", "llama2"], "language": ["en", "zh-Hant"]}),
        ("license: mit\nlanguage: [no, on, en]", {"license": "mit", "language": ["no", "en"]}),
        ("license: mit\nlanguage: ['English', 'x{{ 7 }}', 3, null]", {"license": "mit"}),
        (
            "license: other\nlicense_name: gemma v2\nlicense_link: LICENSE.md",
            {
                "license": "other",
                "license_name": "gemma v2",
                "license_link": f"https://huggingface.co/org/tiny/blob/{COMMIT}/LICENSE.md",
            },
        ),
        (
            "license: other\nlicense_name: \"<b>\"\nlicense_link: https://example.com/l(1) x",
            {"license": "other", "license_link": "https://example.com/l%281%29%20x"},
        ),
        ("license: other\nlicense_link: javascript:alert(1)", {"license": "other"}),
        ("license: other\nlicense_link: ../../LICENSE", {"license": "other"}),
        ("license: other\nlicense_link: '//evil.example/LICENSE'", {"license": "other"}),
        ("license: other\nlicense_link: 'http://[broken'", {"license": "other"}),
        ("license: other\nlicense_link: \"LICENSE\\nmore: x\"", {"license": "other"}),
    ],
)  # fmt: skip
def test_licence_and_language_are_the_base_s(base, yaml_text, found):
    assert inherited(base, f"---\n{yaml_text}\n---\n# Base\n")[0] == found


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (None, "came without a card"),
        ("# No front matter", "names no licence"),
        ("---\n- a\n- list\n---\n", "cannot be read"),
        ("---\nlicense: [unclosed\n---\n", "cannot be read"),
        ("---\ndate: 2026-13-45\n---\n", "cannot be read"),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "cannot be read"),
        ("---\nlicense: 3\n---\n", "names no licence"),
        ("---\nlicense: \"mit\\n---\\n# gone\"\n---\n", "names no licence"),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", "cannot be read"),
        (b"---\nlicense: \xff\xfe\n---\n", "cannot be read"),
    ],
)  # fmt: skip
def test_no_licence_is_a_note_and_no_crash(base, text, note):
    if text is not None:
        (base.folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    card = render(base)
    assert not front_matter(card).keys() & {"license", "license_name", "license_link", "language"}
    assert note in card
    assert "Find out its terms" in card


def test_a_licence_file_travels_with_a_local_base(base):
    local = BaseCheckpoint("tiny", None, base.folder, {}, ())
    (base.folder / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    assert "license_link" not in front_matter(render(local))
    (base.folder / "LICENSE").write_text("terms")
    local = BaseCheckpoint("tiny", None, base.folder, {}, ())
    assert front_matter(render(local))["license_link"] == "LICENSE"


def test_a_card_made_anew_from_the_export_keeps_licence_and_language(base, results):
    _, card = inherited(base, "---\nlicense: llama2\nlicense_link: LICENSE\nlanguage: [no]\n---\n")
    (base.folder / "README.md").write_text(card)  # what the base's folder is for evaluate: the export itself
    again = front_matter(render(base, results))
    assert {k: again[k] for k in ("license", "license_link", "language")} == {
        k: front_matter(card)[k] for k in ("license", "license_link", "language")
    }


# What is quoted


HOSTILE = 'x`|<script>alert(1)</script>\n---\n# Owned\n[a](javascript:b) {{ 7*7 }} **b** \u202e"; import os #'


def test_hostile_names_stay_names(results, tmp_path):
    base = BaseCheckpoint(HOSTILE, HOSTILE, tmp_path, {}, ())
    results |= {"benchmark": HOSTILE, "judge": HOSTILE, "source": HOSTILE, "split": HOSTILE, "device": HOSTILE, "date": HOSTILE}
    figures = results["defences"]
    figures[HOSTILE] = figures["shiftdc"]
    figures["shiftdc"]["by_cell"][HOSTILE] = {"n": 3, "over_refusal": 0.5}
    figures["shiftdc"]["seconds"] = {HOSTILE: 1.0}
    named = {"calibration": {"name": HOSTILE}, "layers": {"criterion": HOSTILE}}
    report = REPORT.model_copy(update={k: getattr(REPORT, k).model_copy(update=v) for k, v in named.items()})
    card = render(base, results, report=report, repo=HOSTILE)
    text = body(card)
    assert ModelCard(card).data.model_name.startswith("x`|<script>")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script" not in prose
    assert "](javascript" not in prose.replace("\\]", "")
    assert "\n# Owned" not in text
    assert "49" not in prose.replace("490", "")
    assert "\u202e" not in card
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    calls = compile(program, "card", "exec")
    assert "os" not in calls.co_names
    table = [line for line in prose.splitlines() if line.startswith("| ")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in table if "script" in line}) <= 3  # no cell was split


def test_escapes():
    assert escaped("a_b*c <i> [x](y) | # ~ $ \\ `") == "a\\_b\\*c &lt;i&gt; \\[x\\](y) \\| \\# \\~ \\$ \\\\ \\`"
    assert escaped("a\r\n\tb\u2028c") == "a b c"
    assert code("v1.0_x") == "`v1.0_x`"
    assert code("a`b|c") == "<code>a\\`b\\|c</code>"
    assert json.loads(python_string('a"b\\\nc')) == 'a"b\\ c'


@pytest.mark.parametrize("reference", ["caption", "text", "blank", "static"])
@pytest.mark.parametrize("gate", ["one-sided", "two-sided"])
def test_every_recipe_gives_a_card(base, results, reference, gate):
    recipe = Recipe.model_validate({**RECIPE.model_dump(), "reference": reference, "gate": gate})
    card = render(base, results, recipe=recipe)
    assert not re.search(r"\{[{%]|[}%]\}", card)
    assert "\n\n\n" not in card
    assert ModelCard(card).data.tags == ["shiftdc", "safety", "vision-language"]


# The Hub's own check


def test_the_hub_is_sent_the_whole_card(base, results, tmp_path):
    """`ModelCard.validate()` in a process of its own: HF_ENDPOINT is read at import."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, sent))
            data = front_matter(sent["content"])
            answer = b"" if data.get("license") == "mit" else b"license: mit expected"
            self.send_response(200 if not answer else 400)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    (base.folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "good.md").write_text(render(base, results))
    (base.folder / "README.md").unlink()
    (tmp_path / "bad.md").write_text(render(base, results))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        program = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
        done = {
            name: subprocess.run(
                [sys.executable, "-c", program, tmp_path / f"{name}.md"],
                env=environment, capture_output=True, text=True, check=False, timeout=60,
            )
            for name in ("good", "bad")
        }  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done["good"].returncode == 0, done["good"].stderr
    assert done["bad"].returncode == 1
    assert "license: mit expected" in done["bad"].stderr
    path, sent = received[0]
    assert (path, sent["repoType"]) == ("/api/validate-yaml", "model")
    assert "attack_success_rate" in sent["content"]
    assert body(sent["content"]).strip() == body((tmp_path / "good.md").read_text()).strip()


def test_prompts_that_are_not_the_templates_own_are_told(base):
    inexact = REPORT.model_copy(update={"prompts": PromptsRecord(compared=1008, different=12)})
    assert "differ from the chat template's own" not in render(base)
    told = render(base, report=inexact)
    assert "**12 of 1008 prompts that `generate()` composed in a check differ from the chat template's own.**" in told
