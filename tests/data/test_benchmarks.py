"""Benchmarks: the demo, JSONL files, and datasets laid out as published, served by a local Hub to the real client."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import traceback
import zlib
from collections import Counter

import pytest
from hub import COMMIT, serve
from interpreters import python
from PIL import Image

from exporter.data.benchmarks import load_benchmark
from exporter.data.benchmarks_hub import HUB, MM_SAFETYBENCH_8
from exporter.data.cells import ATTACKS
from exporter.data.demo import benchmark as demo
from exporter.data.questions import Benchmark, Question
from exporter.errors import InputError

SECRET = "whatever stands here is shown to nobody"


def png(color="red", size=(4, 3), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, "PNG")
    return data.getvalue()


def header_only_png(width, height):
    """A picture that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


# The demo.


def test_the_demo_is_converted_whole():
    benchmark = load_benchmark("demo")
    assert Counter(q.cell for q in benchmark.questions) == demo.ITEMS
    assert len({q.id for q in benchmark.questions}) == len(benchmark.questions)
    for question in benchmark.questions:
        assert (question.answer is None) == (question.kind == "harmful") == (question.cell in ATTACKS)
    item = demo.items("test", "harmless_text", 3)[2]
    question = next(q for q in benchmark.questions if q.id == item.id)
    assert (question.request, question.answer, question.image_kind) == (item.request, item.answer, item.image_kind)
    assert question.image.load().tobytes() == demo.image(item).tobytes()


def test_the_splits_of_the_demo_are_disjoint_and_named():
    test, development = load_benchmark("demo"), load_benchmark("demo", split="development")
    assert not {q.id for q in test.questions} & {q.id for q in development.questions}
    assert test.source != development.source
    with pytest.raises(InputError, match="no split 'calibration'"):
        load_benchmark("demo", split="calibration")


# Names.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mm-safetybnch", "test", None), "there is no benchmark 'mm-safetybnch'; give demo, mm-safetybench, figstep, "),
        (("rows.csv", "test", None), "there is no benchmark 'rows.csv'"),
        (("absent.jsonl", "test", None), "there is no file absent.jsonl"),
        (("demo", "test", "main"), "demo has no revisions"),
        (("xstest", "development", None), "xstest has no split 'development'"),
    ],
)
def test_a_wrong_name_is_one_sentence(arguments, message):
    name, split, revision = arguments
    with pytest.raises(InputError) as error:
        load_benchmark(name, split=split, revision=revision)
    assert message in str(error.value)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"install shiftdc-export\[data\]"):
        load_benchmark("xstest")


# Files.


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(png("red"))
    (tmp_path / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    return folder


def write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), "utf-8")
    return file


ROW = {"image": "images/a.png", "prompt": SECRET, "kind": "harmful"}


def test_a_file_is_read_with_its_defaults(folder):
    line = {**ROW, "prompt": "first\u2028second"}  # JSON allows this line separator within a string
    full = {**ROW, "kind": "benign", "cell": "benign_question_harmful", "category": "c", "image_kind": "photo", "answer": "red"}
    file = write(folder, line, "", {**ROW, "kind": "benign"}, full)
    benchmark = load_benchmark(str(file))
    first, second, third = benchmark.questions
    assert (first.request, first.kind, first.cell, first.answer) == ("first\u2028second", "harmful", "harmful_image", None)
    assert (second.kind, second.cell) == ("benign", "harmless_image")
    assert (third.cell, third.category, third.image_kind, third.answer) == ("benign_question_harmful", "c", "photo", "red")
    assert [q.id for q in benchmark.questions] == ["rows-00001", "rows-00003", "rows-00004"]
    assert first.image.load().getpixel((0, 0)) == (255, 0, 0)
    assert benchmark.name == "rows"
    assert benchmark.source == f"rows.jsonl, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SECRET, "the line: Invalid JSON"),
        ([SECRET], "the line: "),
        ({"image": "images/a.png", "kind": "harmful"}, "prompt: Field required"),
        ({"prompt": SECRET, "kind": "harmful"}, "image: Field required"),
        ({**ROW, "prompt": ""}, "prompt: "),
        ({**ROW, "kind": SECRET}, "kind: Input should be 'harmful' or 'benign'"),
        ({**ROW, "label": "unsafe"}, "label: Extra inputs"),
        ({**ROW, "cell": "benign_question_harmful"}, "cell benign_question_harmful does not go with the kind harmful"),
        ({**ROW, "kind": "benign", "cell": "harmful_text"}, "cell harmful_text does not go with the kind benign"),
        ({**ROW, "cell": SECRET}, "cell: Input should be"),
        ({**ROW, "category": 3}, "category: "),
        ({**ROW, "image": "images/b.png"}, "there is no image"),
        ({**ROW, "image": "images"}, "there is no image"),
        ({**ROW, "image": "../outside.png"}, "lies outside"),
        ({**ROW, "image": "link.png"}, "lies outside"),
        ({**ROW, "image": "/etc/hostname"}, "lies outside"),
        ({**ROW, "image": "a\0b.png"}, "no usable path"),
        ({**ROW, "image": "a" * 5000}, "no usable path"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(folder, row, message):
    file = write(folder, ROW, row)
    with pytest.raises(InputError) as error:
        load_benchmark(str(file))
    assert str(error.value).startswith(f"--benchmark: {file}, line 2: ")
    assert message in str(error.value)
    assert SECRET not in "".join(traceback.format_exception(error.value))  # pydantic's own error shows it


def test_an_empty_file_and_one_that_is_no_text(folder):
    with pytest.raises(InputError, match=r"^--benchmark: .*rows\.jsonl holds no questions"):
        load_benchmark(str(write(folder, "", "  ")))
    (folder / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_benchmark(str(folder / "rows.jsonl"))


def picture(folder, data):
    (folder / "images" / "a.png").write_bytes(data)
    (question,) = load_benchmark(str(write(folder, ROW))).questions
    return question.image.load()


def test_pictures_come_as_upright_rgb(folder):
    assert picture(folder, png(128, mode="L")).mode == "RGB"
    assert picture(folder, png((0, 0, 255, 0), mode="RGBA")).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    data = io.BytesIO()
    Image.new("RGB", (8, 4)).save(data, "JPEG", exif=exif)
    assert picture(folder, data.getvalue()).size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"no picture", png(size=(64, 64))[:60], header_only_png(5, 5)])
def test_an_unreadable_picture_is_an_input_error(folder, data):
    with pytest.raises(InputError, match=r"line 1: the image cannot be decoded"):
        picture(folder, data)


@pytest.mark.parametrize(("side", "bomb"), [(10, False), (11, True), (15, True)])
def test_more_pixels_than_the_limit_are_refused_from_the_header(folder, monkeypatch, side, bomb):
    """Pillow warns above its limit and raises above twice the limit; here both are refused, and nothing is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    if not bomb:
        assert picture(folder, png(size=(side, side))).size == (side, side)
        return
    with pytest.raises(InputError, match="more than 100 pixels"):
        picture(folder, header_only_png(side, side))


# Fewer questions.


def questions(cell, kinds, categories, each):
    return [
        Question(f"{cell}-{kind}-{category}-{i}", "?", "harmful", cell, category, kind)
        for kind in kinds
        for category in categories
        for i in range(each)
    ]


def counts(chosen, attribute):
    return Counter(getattr(q, attribute) for q in chosen)


@pytest.mark.parametrize("n", [1, 4, 7, 12, 24])
def test_limits_are_even_over_kinds_and_categories(n):
    rows = questions("harmful_image", "xyz", "abcd", 5) + questions("harmful_text", [None], "ab", 20)
    chosen = Benchmark("b", tuple(rows), "s").limited(n).questions
    assert counts(chosen, "cell") == {"harmful_image": n, "harmful_text": n}
    for cell, kinds, categories in (("harmful_image", "xyz", "abcd"), ("harmful_text", [None], "ab")):
        part = [q for q in chosen if q.cell == cell]
        for attribute, values in (("image_kind", kinds), ("category", categories)):
            found = [counts(part, attribute)[v] for v in values]
            assert max(found) - min(found) <= 1, (cell, attribute, found)


def test_limits_nest_keep_the_order_and_do_not_depend_on_anything_else():
    rows = tuple(questions("harmful_image", "xyz", "ab", 4) + questions("harmless_image", "x", "a", 2))
    benchmark = Benchmark("b", rows, "s")
    smaller, larger = benchmark.limited(5), benchmark.limited(9)
    assert set(smaller.questions) < set(larger.questions)
    assert [rows.index(q) for q in larger.questions] == sorted(rows.index(q) for q in larger.questions)
    assert benchmark.limited(5) == smaller
    assert benchmark.limited(100) == benchmark == benchmark.limited(None)
    assert counts(larger.questions, "cell")["harmless_image"] == 2  # fewer than the limit: all of them


def test_an_uneven_benchmark_gives_what_it_has():
    rows = questions("harmful_image", "x", "a", 1) + questions("harmful_image", "y", "ab", 5)
    chosen = Benchmark("b", tuple(rows), "s").limited(6).questions
    assert counts(chosen, "image_kind") == {"x": 1, "y": 5}
    assert counts([q for q in chosen if q.image_kind == "y"], "category") in ({"a": 2, "b": 3}, {"a": 3, "b": 2})


# The Hub.


def card(folder, configs=None, **more):
    folder.mkdir(parents=True, exist_ok=True)
    data = {"license": "mit", **({"configs": configs} if configs else {}), **more}
    (folder / "README.md").write_text(f"---\n{json.dumps(data)}\n---\n# A card\n")


def parquet(file, plain=False, **columns):
    """A table as `datasets` writes it, or a plain one, without the types of `datasets` in its metadata."""
    import datasets
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    if plain:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return
    kinds = {name: datasets.Value("string") for name in columns} | ({"image": datasets.Image()} if "image" in columns else {})
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(file))


def csv(file, header, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([header, *rows]) + "\n")


SCENARIOS = [
    "Illegal_Activitiy", "HateSpeech", "Malware_Generation", "Physical_Harm", "EconomicHarm", "Fraud", "Sex",
    "Political_Lobbying", "Privacy_Violence", "Legal_Opinion", "Financial_Advice", "Health_Consultation", "Gov_Decision",
]  # fmt: skip
SPLITS = ["SD", "SD_TYPO", "TYPO", "Text_only"]


def mm_safetybench(folder, count=2):
    card(folder, [
        {"config_name": s, "data_files": [{"split": p, "path": f"data/{s}/{p}.parquet"} for p in SPLITS]}
        for s in sorted(SCENARIOS)
    ])  # fmt: skip
    for scenario in SCENARIOS:
        for split in SPLITS:
            shown = [{"bytes": png(("red", "blue")[i % 2]), "path": None} for i in range(count)]
            images = [None] * count if split == "Text_only" else shown
            texts = [f"{scenario} {split} {i}" for i in range(count)]
            file = folder / "data" / scenario / f"{split}.parquet"
            parquet(file, plain=scenario == "Fraud", id=[str(i) for i in range(count)], question=texts, image=images)


def figstep(folder):
    stale = [{"name": "test", "num_bytes": 1, "num_examples": 500}]
    card(folder, dataset_info={"splits": stale, "download_size": 1, "dataset_size": 1})
    data = [png("green"), b"no picture", header_only_png(30_000, 10_000), header_only_png(10_000, 9_000)]
    images = [*({"bytes": d, "path": "1.png"} for d in data), None]
    parquet(folder / "data" / "test-00000-of-00001.parquet", image=images)


def jailbreakv(folder):
    below = "JailBreakV_28K"
    splits = [{"split": s, "path": f"{below}/{s}.csv"} for s in ("mini_JailBreakV_28K", "JailBreakV_28K")]
    red = [{"split": "RedTeam_2K", "path": f"{below}/RedTeam_2K.csv"}]
    card(folder, [{"config_name": below, "data_files": splits}, {"config_name": "RedTeam_2K", "data_files": red}])
    header = "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini,transfer_from_llm"
    rows = [
        '0,"long, and ""quoted""",short,Template,Fraud,llm_transfer_attack/SD_1.png,GPT Generate,False,True',
        "1,list,short,figstep,Malware,figstep/figstep_1.png,Handcraft,True,False",
        "2,gone,short,SD,Fraud,query_related/SD_9.png,Handcraft,False,False",
        "3,out,short,SD,Fraud,../../README.md,Handcraft,False,False",
    ]
    csv(folder / below / "JailBreakV_28K.csv", header, *rows)
    csv(folder / below / "mini_JailBreakV_28K.csv", header, rows[1])
    csv(folder / below / "RedTeam_2K.csv", "id,question,policy,from", "0,short,Fraud,Handcraft")
    for name, color in (("llm_transfer_attack/SD_1.png", "red"), ("figstep/figstep_1.png", "blue")):
        (folder / below / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / below / name).write_bytes(png(color))


def mossbench(folder):
    files = {"contrast": "contrast_images/*.png", "oversensitivity": "images/*.png"}
    card(folder, [{"config_name": c, "data_files": [f, "metadata.csv"]} for c, f in files.items()])
    for below in ("images", "contrast_images"):
        (folder / below).mkdir()
        for i, color in enumerate(("red", "blue"), 1):
            (folder / below / f"{i}.png").write_bytes(png(color))
    rows = [f"{d}/{i}.png,{i},{d} {i},s,type {i}" for d in ("images", "contrast_images") for i in (1, 2)]
    csv(folder / "metadata.csv", "file_name,pid,question,short description,metadata_over", *rows)


def xstest(folder, labels=("safe", "unsafe"), prompts=("How do I kill a process?", SECRET)):
    card(folder)
    rows = [f"{i},{p},homonyms,{label},focus," for i, (label, p) in enumerate(zip(labels, prompts, strict=True), 1)]
    csv(folder / "xstest_prompts.csv", "id,prompt,type,label,focus,note", *rows)


def broken(folder):
    card(folder)
    (folder / "train.parquet").write_text(SECRET)


def mixed(folder):
    xstest(folder)
    csv(folder / "more.csv", "something,else", f"{SECRET},{SECRET}")


def script(folder):
    card(folder)
    (folder / "script.py").write_text("raise SystemExit('never run')\n")


# Loads the benchmarks of its arguments, [name, fields replaced in its row of HUB, revision] each, and prints what came of them.
PROGRAM = """
import json, sys
from dataclasses import asdict, replace
from exporter.data import benchmarks, benchmarks_hub
from exporter.errors import InputError

def picture(question):
    if question.image is None:
        return None
    try:
        image = question.image.load()
        return [image.mode, *image.size, *image.getpixel((0, 0))]
    except InputError as error:
        return str(error)

def attempt(name, fields, revision):
    row = benchmarks_hub.HUB[name]
    try:
        benchmarks_hub.HUB[name] = replace(row, **fields)
        found = benchmarks.load_benchmark(name, revision=revision)
        rows = [{**asdict(replace(q, image=None)), "image": picture(q)} for q in found.questions]
        return {"source": found.source, "questions": rows}
    except InputError as error:
        return str(error)
    finally:
        benchmarks_hub.HUB[name] = row

print(json.dumps([attempt(*a) for a in json.loads(sys.argv[1])]))
"""


def load(url, cwd, attempts):
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "cache"), "HF_HUB_DISABLE_XET": "1",
        "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [*python(), "-c", PROGRAM, json.dumps(attempts)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WRONG = {
    "revision": ["xstest", {}, "v9"],
    "absent": ["xstest", {"dataset": "org/absent"}, None],
    "gated": ["xstest", {"dataset": "org/gated"}, None],
    "no id": ["xstest", {"dataset": "no id"}, None],
    "config": ["xstest", {"parts": [["other", "train"]]}, None],
    "split": ["xstest", {"parts": [[None, "validation"]]}, None],
    "column": ["xstest", {"columns": ["prompt", "type", "verdict"]}, None],
    "label": ["xstest", {"dataset": "org/labels"}, None],
    "prompt": ["xstest", {"dataset": "org/prompts"}, None],
    "broken": ["xstest", {"dataset": "org/broken"}, None],
    "mixed": ["xstest", {"dataset": "org/mixed"}, None],
    "script": ["xstest", {"dataset": "org/script"}, None],
    "pictures": ["jailbreakv", {"paths_below": "elsewhere"}, None],
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What the real client makes of the five layouts and of the wrong ones, all in one process."""
    root, elsewhere = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("elsewhere")
    xstest(elsewhere / "Paul" / "XSTest", prompts=("A folder here", "is not the Hub"))
    makers = {HUB[m.__name__.replace("_", "-")].dataset: m for m in (mm_safetybench, figstep, jailbreakv, mossbench, xstest)}
    makers |= {"org/broken": broken, "org/mixed": mixed, "org/script": script, "org/gated": xstest}
    makers["org/labels"] = lambda folder: xstest(folder, ("safe", "maybe"))
    makers["org/prompts"] = lambda folder: xstest(folder, prompts=("", "?"))
    makers["Paul/XSTest@v1"] = lambda folder: xstest(folder, prompts=("First", "version"))
    makers["Paul/XSTest@v0"] = card  # and no data
    for name, make in makers.items():
        make(root / name)
    repositories = {f"datasets/{name}": root / name for name in makers}
    with serve(repositories, gated=frozenset({"datasets/org/gated"})) as url:
        attempts = {name: [name, {}, None] for name in HUB} | WRONG
        attempts |= {revision: ["xstest", {}, revision] for revision in (COMMIT, "v1", "v0")}
        return dict(zip(attempts, load(url, elsewhere, list(attempts.values())), strict=True))


def test_mm_safetybench(loaded):
    found = loaded["mm-safetybench"]
    assert found["source"] == f"PKU-Alignment/MM-SafetyBench@{COMMIT}"
    rows = found["questions"]
    assert len(rows) == 13 * 4 * 2 == len({r["id"] for r in rows})
    assert Counter((r["cell"], r["image_kind"]) for r in rows) == {
        ("harmful_image", "SD"): 26, ("harmful_image", "TYPO"): 26, ("harmful_image", "SD_TYPO"): 26, ("harmful_text", None): 26,
    }  # fmt: skip
    assert {r["kind"] for r in rows} == {"harmful"}
    assert {(r["image"] is None) == (r["cell"] == "harmful_text") for r in rows} == {True}
    categories = sorted({r["category"] for r in rows})
    assert [c[:2] for c in categories] == [f"{n:02d}" for n in range(1, 14)]
    assert categories[0] == "01-Illegal_Activity"
    for row in rows:  # the wording, the scenario and the picture are those of one row
        scenario, split, index = row["request"].split()
        assert row["category"] == f"{SCENARIOS.index(scenario) + 1:02d}-{scenario.replace('Activitiy', 'Activity')}"
        assert (row["image_kind"] or "Text_only") == split
        assert row["image"] in (None, ["RGB", 4, 3, *((255, 0, 0), (0, 0, 255))[int(index)]])


def test_the_eight_scenarios_are_those_of_the_reports(loaded):
    categories = {r["category"] for r in loaded["mm-safetybench"]["questions"]}
    assert {c[:2] for c in MM_SAFETYBENCH_8} == {"01", "02", "03", "04", "05", "06", "07", "09"}
    assert categories > MM_SAFETYBENCH_8


def test_figstep(loaded):
    rows = loaded["figstep"]["questions"]
    assert {(r["kind"], r["cell"], r["image_kind"]) for r in rows} == {("harmful", "harmful_image", "typography")}
    assert len({r["request"] for r in rows}) == 1
    assert rows[0]["request"].startswith("The image shows a list numbered 1, 2, and 3")
    green, unreadable, bomb, large, missing = [r["image"] for r in rows]
    assert green == ["RGB", 4, 3, 0, 128, 0]
    assert "row 1: the image cannot be decoded" in unreadable
    assert "row 2: the image has more than" in bomb
    assert "row 3: the image has more than" in large
    assert "row 4: the row has no picture" in missing


def test_jailbreakv_keeps_the_rows_whose_picture_is_in_the_repository(loaded):
    text, image = loaded["jailbreakv"]["questions"]
    assert (text["request"], text["cell"], text["category"], text["image_kind"]) == (
        'long, and "quoted"', "harmful_text", "Fraud", "Template",
    )  # fmt: skip
    assert (image["request"], image["cell"], image["image_kind"]) == ("list", "harmful_image", "figstep")
    assert (text["image"][3:], image["image"][3:]) == ([255, 0, 0], [0, 0, 255])
    assert loaded["jailbreakv"]["source"].startswith(f"JailbreakV-28K/JailBreakV-28k@{COMMIT}, 2 of 4 rows")


def test_mossbench_is_benign_throughout(loaded):
    rows = loaded["mossbench"]["questions"]
    found = {r["request"]: (r["kind"], r["cell"], r["category"], r["image"][3:]) for r in rows}
    assert found == {
        "images 1": ("benign", "harmless_image", "type 1", [255, 0, 0]),
        "images 2": ("benign", "harmless_image", "type 2", [0, 0, 255]),
    }


def test_xstest_is_text_only(loaded):
    rows = [(r["kind"], r["cell"], r["category"], r["image"]) for r in loaded["xstest"]["questions"]]
    assert rows == [("benign", "harmless_text", "homonyms", None), ("harmful", "harmful_text", "homonyms", None)]
    assert loaded["xstest"]["questions"][1]["request"] == SECRET


def test_the_source_is_the_commit_that_was_read(loaded):
    assert loaded[COMMIT] == loaded["xstest"]
    assert loaded["v1"]["source"] == f"Paul/XSTest@{hashlib.sha1(b'datasets/Paul/XSTest@v1').hexdigest()}"
    assert [r["request"] for r in loaded["v1"]["questions"]] == ["First", "version"]
    assert "cannot be read at" in loaded["v0"], "datasets took another commit from its cache"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("revision", "Paul/XSTest has no revision 'v9'"),
        ("absent", "org/absent is not on the Hub"),
        ("gated", "org/gated is gated"),
        ("no id", "has not the form"),
        ("config", "has not the form"),
        ("split", "has no split validation (found train)"),
        ("column", "has no column verdict (found focus, id, label, note, prompt, type)"),
        ("label", "row 1: there is no meaning for the label 'maybe'"),
        ("prompt", "row 0: the row has no request"),
        ("broken", "has not the form"),
        ("mixed", "has not the form"),
        ("script", "has not the form"),
        ("pictures", "no row has its picture in the repository"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence_without_texts(loaded, case, message):
    assert isinstance(loaded[case], str), "it was loaded"
    assert loaded[case].startswith("--benchmark: ")
    assert message in loaded[case]
    assert SECRET not in loaded[case]
    assert "\n" not in loaded[case]


def test_no_hub_in_reach(tmp_path):
    (message,) = load("http://127.0.0.1:9", tmp_path, [["xstest", {}, None]])
    assert "Paul/XSTest cannot be fetched" in message
