"""Prompts composed from token ids, with a tokenizer and chat templates that a reader can follow.

test_prompts.py, in tests/models, compares with real chat templates and tokenizers.
"""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest

from exporter.modeling.prompts_shiftdc import (
    Flat,
    PromptComposer,
    PromptFrame,
    TokenizerCodec,
    _either,
    _runs,
    filled,
)

NAMES = {1: "<s>", 2: "</s>", 3: "<pad>", 4: "<image>", 5: "<row>", 6: "<end>"}
IDS = {name: token for token, name in NAMES.items()}
#: The same letters as other tokens: what a model wrote, or another tokenizer.
ODD = 0x200000


class Letters:
    """One token a letter; special tokens are those of `NAMES`."""

    special, bos = frozenset(NAMES), 1

    def encode(self, text, *, plain=False):
        parts = [text] if plain else re.split("(" + "|".join(NAMES.values()) + ")", text)
        return [t for p in parts for t in ([IDS[p]] if p in IDS and not plain else [100 + ord(c) for c in p])]

    def decode(self, ids):
        return "".join(NAMES[t] if t in NAMES else chr(t - (ODD if t >= ODD else 100)) for t in ids)

    def text(self, ids):
        return self.decode([t for t in ids if t not in NAMES]).strip()

    def written(self, token):
        return NAMES[token]


class DropsSpaces(Letters):
    """As Llama's: the first space of what it decodes is lost, and stands before what it encodes."""

    def encode(self, text, *, plain=False):
        return super().encode(text if text.startswith(tuple(IDS)) else f" {text}", plain=plain)

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


LLAVA = PromptFrame(
    heads=(("USER: ",),), tail=(" ASSISTANT:",), reply=(" ASSISTANT:",), opening=("USER: ",), gap=(),
    around=(((), ("\n",), False), ((), (), False)), between=((),), instead=("", ""), caption="Describe it. Request: {request}",
    text="{request} Caption: {caption}", bos_added=True,
)  # fmt: skip
#: Images in rows, with a token around each and their number beside it; a turn ends with a token.
ROWS = PromptFrame(
    heads=(("User:",),), tail=(6, "Assistant:"), reply=(6, "Assistant:"), opening=("User:",), gap=(" ",),
    around=(((5, "1:"), (5,), False),), between=((5, "12:"), (5, "1:")), instead=("[first]", "[later]"), caption="{request}?",
    text="{caption}|{request}", bos_added=False,
)  # fmt: skip


def composer(frame=LLAVA, codec=None, **changes):
    return PromptComposer(dataclasses.replace(frame, **changes), codec or Letters(), 4)


def ids(text):
    return Letters().encode(text)


def shown(tokens):
    return Letters().decode(tokens)


ONE = "<s>USER: <image><image>\nHow? ASSISTANT:"
TWO = "<s>USER: <image>\nHow? ASSISTANT: So.</s>USER: Why? ASSISTANT:"
BEHIND = "<s>USER: How?<image> ASSISTANT:"
ROW = "<s>User:<row>1:<image><row>2:<image><image><row> How?<end>Assistant:"


@pytest.mark.parametrize(
    ("frame", "prompt", "request_text", "caption", "text"),
    [
        (
            LLAVA,
            ONE,
            "How?",
            "<s>USER: <image><image>\nDescribe it. Request: How? ASSISTANT:",
            "<s>USER: How? Caption: a cat ASSISTANT:",
        ),
        (
            LLAVA,
            TWO,
            "Why?",
            "<s>USER: <image>\nHow? ASSISTANT: So.</s>USER: Describe it. Request: Why? ASSISTANT:",
            "<s>USER: How? ASSISTANT: So.</s>USER: Why? Caption: a cat ASSISTANT:",
        ),
        (
            LLAVA,
            BEHIND,
            "How?",
            "<s>USER: Describe it. Request: How?<image> ASSISTANT:",
            "<s>USER: How? Caption: a cat ASSISTANT:",
        ),
        (
            ROWS,
            ROW,
            "How?",
            "<s>User:<row>1:<image><row>2:<image><image><row> How??<end>Assistant:",
            "<s>User:[first] a cat|How?<end>Assistant:",
        ),
        (
            ROWS,
            "User:How?<row>9:<image><row> <end>Assistant:",
            "How?",
            "User:How??<row>9:<image><row> <end>Assistant:",
            "User:a cat|How?[later] <end>Assistant:",
        ),
    ],
    ids=["one turn", "two turns", "image behind", "rows", "a row behind"],
)
def test_prompts_that_differ_from_a_prompt_by_text(frame, prompt, request_text, caption, text):
    made, given = composer(frame), ids(prompt)
    assert made.request(given) == request_text
    assert shown(made.caption_prompt(given)) == caption
    assert shown(made.text_prompt(given, " a cat ")) == text
    assert made.text_prompt(given, ids(" a cat</s>")) == made.text_prompt(given, "a cat")


def test_a_counterpart_without_a_caption_is_the_request_alone():
    assert shown(composer().text_prompt(ids(ONE))) == "<s>USER: How? ASSISTANT:"
    assert shown(composer(trims=True).text_prompt(ids(ONE.replace("How?", " How? ")))) == "<s>USER: How? ASSISTANT:"


def test_white_space_around_a_request_is_taken_away_where_the_template_does():
    given = ids(ONE)
    padded = {"caption": "  {request}\n", "text": "\n{request} {caption}  "}
    # behind an image a text does not stand at the beginning of its turn
    for trims, request, text in ((True, "  How?", "How? a"), (False, "  How?\n", "\nHow? a  ")):
        made = composer(**padded, trims=trims)
        assert shown(made.caption_prompt(given)) == f"<s>USER: <image><image>\n{request} ASSISTANT:"
        assert shown(made.text_prompt(given, "a")) == f"<s>USER: {text} ASSISTANT:"


@pytest.mark.parametrize(
    ("changes", "prompt", "request_text"),
    [
        ({"tail": ()}, "<s>USER: <image>\nHow?", "How?"),
        ({"tail": (), "reply": ()}, "<s>USER: <image>\nHow?", "How?"),
        ({"tail": ("never",), "reply": ()}, "<s>USER: <image>\nHow?", "How?"),
        ({"heads": ((),)}, "<s><image>\nHow? ASSISTANT:", "How?"),
        ({"heads": (("never",),)}, "<image>\nHow? ASSISTANT:", "How?"),
        ({"heads": (("never",),)}, "How? ASSISTANT:", "How?"),
        ({}, "<image>USER: How? ASSISTANT:", "USER: How?"),
        ({}, "How? ASSISTANT:", "How?"),
        ({"gap": ("How? and",)}, "USER: <image>How? ASSISTANT:", "How?"),
        ({}, "USER: <image>\n<image>\nHow? ASSISTANT:", "How?"),
        ({}, "USER: <image>Which?<image> ASSISTANT:", "Which?"),
        ({}, "USER: <image> \n<image> ASSISTANT:", " \n"),
        ({"heads": (("never",),)}, "<image> \n<image> ASSISTANT:", " \n"),
        ({}, "USER: One<image>two ASSISTANT:", "two"),
        ({}, "USER: How? ASSISTANT:<image>", "How?"),
        ({}, "USER: A ASSISTANT: B USER: C ASSISTANT: D USER: E ASSISTANT:", "E"),
        ({}, "USER: A USER: B ASSISTANT:", "A USER: B"),
        ({}, "How? ASSISTANT: A USER: B", "How?"),
        ({}, " ASSISTANT:", ""),
        ({"reply": ()}, " ASSISTANT:", ""),
        ({}, " ASSISTANT: B ASSISTANT:", " B"),
        ({"reply": (), "heads": ((),), "tail": ()}, "How?", "How?"),
        ({}, "USER: A ASSISTANT: B USER: C ASSISTANT: D", "C"),
        ({}, "USER: A ASSISTANT: B ASSISTANT:", " B"),
    ],
)
def test_where_the_request_stands(changes, prompt, request_text):
    assert composer(**changes).request(ids(prompt)) == request_text


def test_a_request_is_shown_with_special_tokens_as_they_are_written():
    assert composer().request(ids("USER: a</s>b<pad> ASSISTANT:")) == "a</s>b<pad>"


@pytest.mark.parametrize(
    ("changes", "prompt", "end"),
    [
        ({}, ONE, -1),
        ({}, f"{ONE} No.", -5),
        ({}, f"{ONE} No. USER: Why?", None),
        ({}, f"{ONE} No. USER: Why? ASSISTANT:", -1),
        ({}, ONE[:-1], None),
        ({}, " ASSISTANT:", -1),
        ({"heads": ((),)}, f"{ONE} No.", -5),
        ({"tail": ()}, ONE, None),
        ({"tail": (), "heads": ((),)}, ONE, None),
    ],
)
def test_where_the_prompt_ends(changes, prompt, end):
    made, given = composer(**changes), ids(prompt)
    assert made.prompt_end(given) == (end if end is None else len(given) + end)
    assert made.prompt_end(tuple(given)) == made.prompt_end(given)
    assert made.has_prompt_end is ("tail" not in changes)


@pytest.mark.parametrize(
    ("changes", "prompt", "prefix"),
    [
        ({}, ONE, "<s>USER: <image><image>"),
        ({}, TWO, "<s>USER: <image>"),
        ({}, BEHIND, ""),  # another request stands before it
        ({"caption": "{request}"}, BEHIND, "<s>USER: How?<image>"),
        ({}, "<s>USER: How? ASSISTANT:", ""),
        ({"caption": "{request}"}, "<s>USER: How? ASSISTANT:", ""),
        ({"tail": ()}, "<s>USER: <image>", ""),  # nothing stands behind it
        ({"tail": (), "caption": ""}, "<s>USER: <image>a", ""),
        ({"caption": "<image>{request}"}, ONE, "<s>USER: <image><image>"),  # as text
    ],
)
def test_what_a_prompt_and_its_caption_prompt_have_in_common(changes, prompt, prefix):
    assert shown(composer(**changes).image_prefix(ids(prompt))) == prefix


def test_what_is_left_as_it_was_keeps_its_tokens():
    odd = [ODD + ord(c) for c in "USER: "]
    given = [1, *odd, 4, *ids("\nHow? ASSISTANT:")]
    assert composer().caption_prompt(given)[: len(odd) + 2] == [1, *odd, 4]
    again = [*ids("<s>USER: <image>\nHow? ASSISTANT:"), *(ODD + ord(c) for c in " So."), *ids("</s>USER: Why? ASSISTANT:")]
    assert composer(codec=Letters()).caption_prompt(again)[:12] == again[:12]


def test_a_text_forges_no_special_token():
    made, forged = composer(), Letters().encode("a</s><image>", plain=True)
    given = [*ids("<s>USER: <image>\n"), *forged, *ids(" ASSISTANT:")]
    for prompt in (made.caption_prompt(given), made.text_prompt(given, forged), made.text_prompt(given, "b<image>")):
        assert prompt.count(2) == 0 and prompt.count(4) == (prompt == made.caption_prompt(given))
    assert shown(made.text_prompt(ids(ONE), "a\ud800b\udfffc")) == "<s>USER: How? Caption: a\ufffdb\ufffdc ASSISTANT:"
    lone = [*ids("<s>USER: <image>\na"), 100 + 0xD800, *ids(" ASSISTANT:")]
    assert made.request(lone) == "a\ufffd" and made.request(lone[-12:]) == "\ufffd"


@pytest.mark.parametrize("bos_added", [False, True])
def test_a_tokenizer_that_drops_the_first_space(bos_added):
    """Text behind the first token is decoded with it where that alone keeps a space; what was added is not written."""
    codec = DropsSpaces()
    made = composer(codec=codec, bos_added=bos_added, heads=((" USER: ",),), opening=(" USER: ",))
    given = ids("<s> USER: <image> How? ASSISTANT:")
    assert made.flat(given).text.count(" USER") == (not bos_added)
    assert made.flat(given[1:]).text.startswith("USER")
    assert made.caption_prompt(given)[: given.index(4) + 1] == given[: given.index(4) + 1]


def test_text_is_tokenised_behind_what_stands_before_it():
    """At the start of a text this tokenizer writes a space, which is not to come in the middle of a prompt."""
    made = composer(codec=DropsSpaces())
    for before, space in (("", " "), ("x</s>", "")):
        found = shown(made.caption_prompt(ids(f"<s>{before}<s>USER: How?<image> ASSISTANT:" if before else BEHIND)))
        start = f"<s>{before}<s>" if before else "<s>"
        assert found == f"{start}{space}USER: Describe it. Request: How?<image> ASSISTANT:"


def test_whether_text_keeps_its_space_behind_a_special_token():
    class Strips(Letters):
        def decode(self, ids):
            return super().decode(ids).replace("> ", ">")

    class Lower(Letters):
        def encode(self, text, *, plain=False):
            return super().encode(text.lower(), plain=plain)

    assert [composer(codec=codec())._keeps_space(1) for codec in (Letters, Lower, Strips)] == [True, True, False]


def test_a_tokenizer_that_reads_no_special_token_in_a_text():
    class ReadsNone(Letters):
        def encode(self, text, *, plain=False):
            return super().encode(text, plain=True)

    for bos_added in (False, True):
        found = composer(codec=ReadsNone(), bos_added=bos_added).caption_prompt(ids(BEHIND))
        assert shown(found) == "<s>USER: Describe it. Request: How?<image> ASSISTANT:"


def test_a_prompt_as_text():
    flat = composer().flat(ids("<s>ab<image><image>c</s>"))
    assert type(flat) is Flat
    assert flat.marks == {4: "\ud800", 1: "\ud801", 2: "\ud802"}
    assert flat.text == "\ud801ab\ud800\ud800c\ud802"
    assert flat.runs == {(None, "ab"): ids("ab"), (4, "c"): ids("c")}
    later = composer(bos_added=False).flat(ids("<s>ab</s><s>c"))
    assert set(later.runs) == {(1, "ab"), (1, "c")}
    assert set(composer().flat(ids("<s>ab</s><s>c")).runs) == {(None, "ab"), (1, "c")}
    assert set(composer().flat(ids("x<s>ab")).runs) == {(None, "x"), (1, "ab")}


@pytest.mark.parametrize(("count", "fits"), [(0xDFFF - 0xD800 + 1, True), (0xDFFF - 0xD800 + 2, False)])
def test_as_many_special_tokens_as_there_are_marks(count, fits):
    codec = SimpleNamespace(special=frozenset(range(3000)), bos=None, encode=None, decode=str, written=str)
    frame = PromptFrame(((),), (), (), (), (), (((), (), False),), ((),), ("", ""), "", "", False)
    made = PromptComposer(frame, codec, 0)
    if fits:
        assert len(made.flat(range(count)).text) == count
    else:
        with pytest.raises(ValueError) as raised:
            made.flat(range(count))
        assert str(raised.value) == f"The prompt holds {count} different special tokens, more than can be told apart."


# parts


def test_a_frame_is_the_same_behind_json():
    values = ROWS.as_json()
    assert values["around"] == [[[5, "1:"], [5], False]] and values["instead"] == ["[first]", "[later]"]
    assert PromptFrame.from_json(values) == ROWS
    least = {k: v for k, v in values.items() if k not in ("own", "trims")}  # as older exports have it
    assert PromptFrame.from_json(least) == ROWS and (ROWS.own, ROWS.trims) == (False, False)


def test_slots_are_filled_once():
    assert filled("{a}{b} {c}", a="{b}", b="{a}\\1") == "{b}{a}\\1 {c}"
    assert filled("{long_name}", long_name="x") == "x"


def test_runs_between_special_tokens():
    assert list(_runs([7, 8, 1, 1, 9], frozenset({1}))) == [(1, [7, 8]), (1, []), (None, [9])]


def test_the_longest_text_is_tried_first_and_digits_stand_for_any():
    pattern = re.compile(_either(["a", "a1", "a", "b.", ""]))
    assert pattern.match("a27x")[0] == "a27" and pattern.match("ax")[0] == "a"
    assert re.match(_either(["a9", "a1b"]), "a5b")[0] == "a5b"
    assert pattern.match("b.")[0] == "b." and pattern.match("bc")[0] == ""


class FakeTokenizer:
    """Records how it is called."""

    def __init__(self, unknown=9):
        self.added_tokens_decoder = {
            4: SimpleNamespace(special=True),
            5: SimpleNamespace(special=False),
            9: SimpleNamespace(special=True),
        }
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = 1, 2, 3, unknown
        self.all_special_ids = [1, 2, 7, unknown]
        self.calls = []

    def __call__(self, text, **options):
        self.calls.append(options)
        return {"input_ids": [len(text)]}

    def decode(self, given, **options):
        self.calls.append(options)
        return f" {given} "

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


def test_a_tokenizer_of_transformers():
    tokenizer = FakeTokenizer()
    codec = TokenizerCodec(tokenizer)
    assert codec.special == {1, 2, 4, 7} and codec.bos == 1 and codec.tokenizer is tokenizer
    for named in (1, 2, 3):  # it stands for more than text
        assert named in TokenizerCodec(FakeTokenizer(unknown=named)).special | {3}
    assert codec.encode("abc") == [3] and codec.encode("ab", plain=True) == [2]
    assert codec.decode((1, 2)) == " [1, 2] " and codec.text((1, 2)) == "[1, 2]"
    assert codec.written(8) == "<8>"
    assert tokenizer.calls == [
        {"add_special_tokens": False, "split_special_tokens": False, "verbose": False},
        {"add_special_tokens": False, "split_special_tokens": True, "verbose": False},
        {"skip_special_tokens": False, "clean_up_tokenization_spaces": False},
        {"skip_special_tokens": True, "clean_up_tokenization_spaces": False},
    ]
