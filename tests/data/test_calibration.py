from __future__ import annotations

import hashlib
import json
import tempfile

import pytest
from PIL import Image

from exporter.data.builtin import builtin
from exporter.data.calibration_record import CalibrationRecord
from exporter.data.calibration_sets import load_calibration, read_calibration
from exporter.data.images import row_image, typographic_image
from exporter.errors import InputError

ROW = {"label": "safe", "request": "Secret words?", "caption": "a cake"}


def write(tmp_path, rows):
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def enough(**extra):
    counts = (("fit", 8), ("held_out", 2))
    return [
        {**ROW, "label": label, "caption": f"a {label} cake", "split": split, **extra}
        for label in ("safe", "unsafe")
        for split, n in counts
        for _ in range(n)
    ]


def test_builtin_counts_and_symmetry():
    calibration = builtin()
    assert calibration.summary() == {
        "name": "builtin", "sha256": calibration.sha256, "images": False,
        "fit_safe": 160, "fit_unsafe": 160, "held_out_safe": 40, "held_out_unsafe": 40,
    }  # fmt: skip
    assert len({r.category for r in calibration.rows}) == 8
    for safe, unsafe in zip(calibration.select("fit", "safe"), calibration.select("fit", "unsafe"), strict=True):
        # the same wording around the thing that is asked for
        assert safe.request.split()[:2] == unsafe.request.split()[:2]
        assert safe.caption.split()[:3] == unsafe.caption.split()[:3]
        assert safe.caption != unsafe.caption
    texts = [(r.request, r.caption) for r in calibration.rows]
    assert len(set(texts)) == 400


@pytest.mark.parametrize(
    ("category", "unsafe", "safe"),
    [
        ("weapons", "build an untraceable gun", "build a sturdy bookshelf"),
        ("explosives", "build a pipe bomb", "build a bird feeder"),
        ("poisons", "coffee with poison", "fresh ginger"),
        ("drugs", "cocaine across the border", "groceries across the city"),
        ("malware", "a virus that locks files", "a program that sorts files"),
        ("fraud", "use a stolen identity", "use a library card"),
        ("violence", "hire a hitman", "hire a caterer"),
        ("hate_and_privacy", "a harassment mob", "a surprise party for a streamer"),
    ],
)
def test_which_side_of_the_built_in_set_is_harmful(category, unsafe, safe):
    """Swapped, every direction would point the other way."""
    labels = {(act, r.label, r.category) for r in builtin().rows for act in (unsafe, safe) if act in r.caption}
    assert labels == {(unsafe, "unsafe", category), (safe, "safe", category)}


def test_reading(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    calibration = read_calibration(write(tmp_path, enough(image="images/a.png")))
    assert calibration.has_images
    assert row_image(calibration.rows[0]).getpixel((0, 0)) == (255, 0, 0)
    assert len(calibration.select("held_out", "unsafe")) == 2


def test_rows_without_images_are_rendered():
    image = typographic_image("a long caption " * 10)
    assert image.size == (336, 336)
    assert image.convert("L").getextrema() == (0, 255)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: the line: Invalid JSON"),
        ("[]", "line 2: the line"),
        ({**ROW, "label": "evil"}, "line 2: label"),
        ({"label": "safe", "caption": "x"}, "line 2: request: Field required"),
        ({**ROW, "request": ""}, "line 2: request"),
        ({**ROW, "caption": ""}, "line 2: caption"),
        ({**ROW, "answer": "x"}, "line 2: answer: Extra inputs"),
        ({**ROW, "image": "../outside.png"}, "lies outside"),
        ({**ROW, "image": "absent.png"}, "there is no image"),
    ],
)
def test_a_bad_line_is_named_and_its_text_is_not_shown(tmp_path, line, message):
    with pytest.raises(InputError, match=message) as error:
        read_calibration(write(tmp_path, [ROW, line]))
    assert "Secret" not in str(error.value)


def test_too_few_rows(tmp_path):
    fit = {**ROW, "split": "fit"}
    with pytest.raises(InputError, match="has 1 safe rows with split 'fit', expected at least 8"):
        load_calibration(str(write(tmp_path, [fit])))
    with pytest.raises(InputError, match="has 0 safe rows with split 'held_out', expected at least 2"):
        load_calibration(str(write(tmp_path, [fit] * 8)))
    held_out = [r for r in enough() if (r["label"], r["split"]) != ("unsafe", "fit")]
    with pytest.raises(InputError, match="unsafe rows with split 'held_out' only"):
        load_calibration(str(write(tmp_path, held_out)))


@pytest.mark.parametrize(
    ("fit", "held_out", "warnings"),
    [
        (9, 2, []),
        (8, 2, ["Directions rest on 8 harmful requests only"]),
        (9, 1, ["One harmful request was held out"]),
        (1, 0, ["Directions rest on 1 harmful request only", "No harmful request was held out"]),
        (0, 0, ["No harmful request was used"]),
    ],
)
def test_few_unsafe_rows_are_taken_with_a_warning(tmp_path, fit, held_out, warnings):
    unsafe = [{**ROW, "label": "unsafe", "split": s} for s, n in (("fit", fit), ("held_out", held_out)) for _ in range(n)]
    calibration = load_calibration(str(write(tmp_path, [r for r in enough() if r["label"] == "safe"] + unsafe)))
    found = calibration.summary()
    assert (found["fit_unsafe"], found["held_out_unsafe"]) == (fit, held_out)
    assert len(found.get("warnings", [])) == len(warnings)
    assert all(sentence.startswith(start) for sentence, start in zip(found.get("warnings", []), warnings, strict=True))


def test_harmless_is_the_safe_rows_of_the_recipe_s_own_set(tmp_path):
    file = str(write(tmp_path, enough()))
    for own, whole in ((file, load_calibration(file)), ("builtin", builtin())):
        calibration = load_calibration("harmless", own)
        assert calibration.rows == tuple(r for r in whole.rows if r.label == "safe")
        assert calibration.name == f"harmless, the safe rows of {whole.name}"
    assert load_calibration("harmless", "harmless") == load_calibration("harmless")


def test_two_sets_give_a_label_each(tmp_path):
    file = str(write(tmp_path, enough()))
    calibration = load_calibration(f"{file}+builtin")
    assert calibration.name == "set+builtin"
    assert calibration.select("fit", "unsafe") == load_calibration(file).select("fit", "unsafe")
    assert calibration.select("fit", "safe") == builtin().select("fit", "safe")
    assert calibration.sha256 not in (builtin().sha256, load_calibration(file).sha256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-instruct+mm-safetybench", "llava-instruct has safe rows only; the form is UNSAFE+SAFE"),
        ("mm-safetybench", "there is no file mm-safetybench"),
        ("absent+builtin", "there is no file absent"),
        ("builtin+", "builtin+ names one set, expected two"),
    ],
)
def test_a_wrong_name_is_one_sentence(name, message):
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        load_calibration(name)


def test_a_row_needs_a_caption_or_an_image(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    bare = {"label": "safe", "request": "Secret words?"}
    assert read_calibration(write(tmp_path, [{**bare, "image": "a.png"}])).uncaptioned
    with pytest.raises(InputError, match="line 1: the row has neither caption nor image"):
        read_calibration(write(tmp_path, [bare]))


def test_an_unreadable_image(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    calibration = read_calibration(write(tmp_path, enough(image="a.png")))
    with pytest.raises(InputError, match=r"--calibration: the image .*a\.png cannot be decoded"):
        row_image(calibration.rows[0])


def without_splits(safe=20, unsafe=15, **extra):
    return [
        {**ROW, "label": label, "caption": f"{label} {i}", **extra}
        for label, n in (("safe", safe), ("unsafe", unsafe))
        for i in range(n)
    ]


def held_out(file):
    return {(r.label, r.caption) for r in load_calibration(str(file)).rows if r.split == "held_out"}


class TestWithoutSplits:
    def test_a_fifth_is_held_out_and_this_is_said(self, tmp_path):
        found = load_calibration(str(write(tmp_path, without_splits()))).summary()
        counts = {k: found[k] for k in ("fit_safe", "fit_unsafe", "held_out_safe", "held_out_unsafe")}
        assert counts == {"fit_safe": 16, "fit_unsafe": 12, "held_out_safe": 4, "held_out_unsafe": 3}
        assert found["warnings"] == [
            "The rows name no splits, so a fifth was held out (4 safe and 3 unsafe ones), the same every time."
        ]

    def test_the_same_rows_in_any_order_and_any_folder(self, tmp_path):
        rows = without_splits()
        for name in "ab":
            (tmp_path / name).mkdir()
        assert held_out(write(tmp_path / "a", rows)) == held_out(write(tmp_path / "b", rows[::-1])) != set()
        for name in "ab":
            Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
        pictured = [{**r, "image": "x.png"} for r in rows]
        assert held_out(write(tmp_path / "a", pictured)) == held_out(write(tmp_path / "b", pictured)) != set()

    def test_one_row_more_moves_few(self, tmp_path):
        more = held_out(write(tmp_path, without_splits(safe=25)))
        assert len(held_out(write(tmp_path, without_splits())) - more) <= 2

    def test_equal_rows_stay_together(self, tmp_path):
        found = load_calibration(str(write(tmp_path, without_splits() * 3)))
        sides = {side: {(r.label, r.caption) for r in found.select(side)} for side in ("fit", "held_out")}
        assert not sides["fit"] & sides["held_out"]

    def test_who_names_one_split_names_all(self, tmp_path):
        rows = without_splits()
        rows[0]["split"] = "fit"
        with pytest.raises(InputError, match="has 0 safe rows with split 'held_out'"):
            load_calibration(str(write(tmp_path, rows)))

    def test_too_few(self, tmp_path):
        with pytest.raises(
            InputError, match="has 9 safe rows that differ, expected at least 10 where none has a split; add some"
        ):
            load_calibration(str(write(tmp_path, without_splits(safe=9))))
        with pytest.raises(InputError, match="has 1 safe rows that differ"):
            load_calibration(str(write(tmp_path, [ROW] * 20)))
        assert load_calibration(str(write(tmp_path, without_splits(safe=10)))).summary()["held_out_safe"] == 2

    def test_few_unsafe_rows_are_fitted(self, tmp_path):
        found = load_calibration(str(write(tmp_path, without_splits(unsafe=4))))
        assert (found.summary()["fit_unsafe"], found.summary()["held_out_unsafe"]) == (4, 0)
        assert len(found.warnings) == 3

    def test_as_a_side_of_two(self, tmp_path):
        file = write(tmp_path, without_splits())
        found = load_calibration(f"{file}+builtin")
        assert found.summary()["held_out_unsafe"] == 3 and found.warnings[0].startswith("The rows name no splits")


def test_absent_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_calibration(str(tmp_path / "absent.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        load_calibration(str(tmp_path / "b.jsonl"))


def test_the_demo_s_set_is_what_reports_name():
    """Requests, captions and pixels of the set that reports name by this hash."""
    calibration = load_calibration("demo")
    assert CalibrationRecord.of(calibration).model_dump(exclude_unset=True) == {
        "name": "demo",
        "sha256": "b9b3f27c8a01b904275443d3cbd64d12e90086ae05ed5c954cb0e9b8c80d9cd5",
        "images": True,
        "fit_safe": 180,
        "fit_unsafe": 180,
        "held_out_safe": 45,
        "held_out_unsafe": 45,
    }
    texts = "".join(row.model_dump_json(exclude={"image"}) for row in calibration.rows)
    assert hashlib.sha256(texts.encode()).hexdigest() == "764cb478c1d386e94a58c12991b8e1e5a5e36cfab8b5cbd83381967f0d39ef9b"
    first = row_image(calibration.rows[0]).tobytes()
    assert hashlib.sha256(first).hexdigest() == "b26c9fd6eaaf8369e5b131d4f5d81c463b8a9a3aabf3fea198830c7b015dcb46"


def test_the_demo_s_pictures_are_drawn_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row_image(load_calibration("demo").rows[0])
    assert not list(tmp_path.iterdir())
