"""What a batch of prompts says of itself: rows with an image, where prompts end, padding, and calls that cannot be calibrated."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from exporter.modeling.inputs_shiftdc import (
    ImageArguments,
    Padding,
    Prompt,
    align_prefixes,
    by_name,
    image_arguments,
    last_true,
    left_padded,
    position_to_correct,
    prompt_ends,
    refuse_embeddings,
    refuse_packed_rows,
    require_input_ids,
    require_pixels,
)

IMAGE, END = 4, 9
CPU = torch.device("cpu")
IDS = torch.tensor([[1, IMAGE, IMAGE, 7], [1, 5, 6, 7]])
PIXELS = torch.arange(2.0)
OPT_OUT = r"pass shiftdc=False \(no calibration\)"


def types_of_tokens(ids, given):
    """As Gemma's: a number for each token of the prompt; `given` decides the name."""
    return {"mm_types": (ids == IMAGE).long()} if "mm_types" in given else {}


ARGUMENTS = ImageArguments(
    names=frozenset({"pixel_values", "aspect", "mm_types", "token_type_ids"}),
    by_row=frozenset({"aspect"}),
    token_inputs=types_of_tokens,
    image_token_id=IMAGE,
    video_token_id=8,
)


class TestImageArguments:
    def test_which_arguments_of_a_forward_describe_images(self):
        def forward(self, input_ids, pixel_values, image_sizes=None, labels=None, past_key_values=None, **kwargs):
            raise AssertionError

        # those that say of each token what it is are made anew, whether forward() names them or not
        assert image_arguments(forward) == {"pixel_values", "image_sizes", "token_type_ids", "mm_token_type_ids"}

    def test_those_that_a_call_has(self):
        call = {"pixel_values": PIXELS, "aspect": None, "input_ids": IDS, "max_new_tokens": 1}
        assert ARGUMENTS.among(call) == {"pixel_values": PIXELS}

    def test_rows_that_hold_an_image(self):
        prompt = ARGUMENTS.prompt(IDS, None, {"pixel_values": PIXELS})
        assert prompt.rows.tolist() == [True, False]
        assert prompt.arguments.keys() == {"input_ids", "pixel_values"}
        masked = ARGUMENTS.prompt(IDS, torch.ones_like(IDS), {})
        assert masked.arguments.keys() == {"input_ids", "attention_mask"}
        assert masked.arguments["attention_mask"] is masked.mask and masked.arguments["input_ids"] is IDS

    def test_videos_are_refused(self):
        video = torch.tensor([[1, 5], [8, 5]])
        refused = pytest.raises(ValueError, match=rf"holds a video, .*; give its frames as images, or {OPT_OUT}\.$")
        with refused:
            ARGUMENTS.refuse_other_media(ARGUMENTS.prompt(video, None, {}))
        ARGUMENTS.refuse_other_media(ARGUMENTS.prompt(IDS, None, {}))
        # of a class whose videos have a token of their own, the ids tell
        ARGUMENTS.refuse_other_media(ARGUMENTS.prompt(IDS, None, {"pixel_values_videos": PIXELS}))
        without = ImageArguments(frozenset(), frozenset(), types_of_tokens, IMAGE, video_token_id=None)
        without.refuse_other_media(without.prompt(video, None, {}))
        for name in ("pixel_values_videos", "video_grid_thw"):
            with pytest.raises(ValueError, match="holds a video"):
                without.refuse_other_media(without.prompt(IDS, None, {name: PIXELS}))

    @pytest.mark.parametrize("name", ["input_features", "feature_attention_mask", "audio_values"])
    def test_sounds_beside_an_image_are_refused(self, name):
        with pytest.raises(ValueError, match=rf"^A sound is given beside an image, .*; leave it out, or {OPT_OUT}\.$"):
            ARGUMENTS.refuse_other_media(ARGUMENTS.prompt(IDS, None, {name: PIXELS}))
        ARGUMENTS.refuse_other_media(ARGUMENTS.prompt(IDS[1:], None, {name: PIXELS}))  # and without one they are the base's

    def test_images_of_some_rows(self):
        """Only what has an entry for every row is cut: other tensors have one for every image."""
        aspect = torch.tensor([[1], [2], [3]])
        found = ARGUMENTS.of_rows({"aspect": aspect, "pixel_values": PIXELS}, torch.tensor([True, False, True]))
        assert found["aspect"].tolist() == [[1], [3]]
        assert found["pixel_values"] is PIXELS
        of_images = aspect[:2]  # rows without an image have no entry
        assert ARGUMENTS.of_rows({"aspect": of_images}, torch.tensor([True, False, True]))["aspect"] is of_images

    def test_arguments_as_long_as_the_prompt(self):
        given = {"mm_types": torch.zeros(2, 4), "token_type_ids": IDS, "mm_token_type_ids": IDS, "pixel_values": PIXELS}
        assert ARGUMENTS.for_tokens(IDS, given)["mm_types"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
        assert ARGUMENTS.without_tokens(given, IDS) == {"pixel_values": PIXELS}

    def test_making_them_to_know_their_names_takes_one_token(self):
        seen = []
        arguments = ImageArguments(frozenset(), frozenset(), lambda ids, *_: seen.append(ids.tolist()) or {}, IMAGE, None)
        arguments.without_tokens({}, IDS)
        assert seen == [[[1], [1]]]


class TestCallsThatCannotBeCalibrated:
    @pytest.mark.parametrize("images", [{}, {"pixel_values": None}, {"token_type_ids": IDS, "mm_token_type_ids": IDS}])
    def test_image_tokens_without_an_image(self, images):
        sentence = (
            "The prompt holds image tokens but no image was given, so no reference can be computed: pass pixel_values, "
            "shiftdc_reference= or shiftdc_captions=, or shiftdc=False (no calibration)."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            require_pixels(images)

    @pytest.mark.parametrize("images", [{"pixel_values": PIXELS}, {"token_type_ids": IDS, "mm_encoder_outputs": PIXELS}])
    def test_with_one(self, images):
        require_pixels(images)

    def test_ids_are_needed(self):
        with pytest.raises(ValueError, match=rf"^generate\(\) needs input_ids to see which rows hold an image; or {OPT_OUT}\.$"):
            require_input_ids(None, {})
        assert require_input_ids(IDS, {"inputs_embeds": None, "assistant_model": None}) is IDS

    def test_embeddings(self):
        sentence = rf"^inputs_embeds may hold an image that input_ids do not show; .*or {OPT_OUT}\.$"
        for call in (refuse_embeddings, lambda kwargs: require_input_ids(IDS, kwargs)):
            with pytest.raises(ValueError, match=sentence):
                call({"inputs_embeds": torch.zeros(1)})
        refuse_embeddings({"inputs_embeds": None})
        refuse_embeddings({})

    def test_assistants(self):
        with pytest.raises(ValueError, match=rf"^assistant_model is not supported with calibration; drop it, or {OPT_OUT}\.$"):
            require_input_ids(IDS, {"assistant_model": object()})


class TestPackedRows:
    @pytest.mark.parametrize(
        ("positions", "mask"),
        [
            ([[0, 1, 0, 1]], None),
            ([[0, 1, 2, 3], [0, 1, 2, 0]], None),  # in any row, and in its last column
            ([[1, 0, 1, 2]], None),
            ([[1, 0]], None),
            ([[0, 1, 0, 1]], [[1, 1, 1, 1]]),
            ([[9, 0, 1, 0]], [[0, 1, 1, 1]]),
            ([[0, 1, 0]], [[0, 1, 1, 1]]),  # the mask has what is cached too
            ([[[0, 1, 0, 1]], [[0, 1, 2, 3]], [[0, 1, 2, 3]]], None),  # of Qwen's three axes the first is time
        ],
    )
    def test_several_prompts_in_a_row(self, positions, mask):
        arguments = {"position_ids": torch.tensor(positions)}
        with pytest.raises(ValueError, match=rf"^A row holds several prompts .*give a row to each prompt, or {OPT_OUT}\.$"):
            refuse_packed_rows(arguments, None if mask is None else torch.tensor(mask))

    @pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"])
    def test_as_attention_kernels_are_told(self, name):
        with pytest.raises(ValueError, match="several prompts"):
            refuse_packed_rows({name: torch.tensor([0, 4, 8])}, None)
        refuse_packed_rows({name: None}, None)

    @pytest.mark.parametrize(
        ("positions", "mask"),
        [
            ([[0, 1, 2, 3]], None),
            ([[0, 1, 1, 1]], None),  # an image's parts may share a position
            ([[7]], None),  # a step of decoding
            ([[0], [0]], None),
            ([[1, 0, 1, 2]], [[0, 1, 1, 1]]),  # padding has any position, on the left
            ([[0, 1, 2, 0]], [[1, 1, 1, 0]]),  # and on the right
            ([[0, 1, 2, 3]], [[1, 1, 1, 1]]),
            ([[1, 0, 1]], [[1, 0, 1, 1]]),  # behind one that is cached
            ([[[0, 1, 2, 3]], [[0, 3, 0, 3]], [[0, 1, 0, 1]]], None),  # height and width start anew
        ],
    )
    def test_one_prompt_in_each_row(self, positions, mask):
        refuse_packed_rows({"position_ids": torch.tensor(positions)}, None if mask is None else torch.tensor(mask))

    def test_a_call_without_positions(self):
        refuse_packed_rows({}, torch.ones(1, 4))


class TestPadding:
    def test_what_fills_empty_columns(self):
        assert Padding(3, frozenset({2})).filler == 3
        assert Padding(0, frozenset({2})).filler == 0
        assert Padding(None, frozenset({7, 2})).filler == 2
        assert Padding(None, frozenset()).filler == 0

    @pytest.mark.parametrize(
        ("padding", "mask"),
        [
            (Padding(3, frozenset({2})), [[0, 1, 1]]),
            (Padding(3, frozenset({3})), [[1, 1, 1]]),  # it may be the end of an earlier turn
            (Padding(None, frozenset({2})), [[1, 1, 1]]),
        ],
    )
    def test_what_is_masked_without_a_mask(self, padding, mask):
        found = padding.mask(torch.tensor([[3, 5, 2]]))
        assert found.tolist() == mask and found.dtype == torch.int64

    def test_token_lists_are_of_the_rows_with_an_image_and_without_padding(self):
        ids, rows = torch.tensor([[3, 1, IMAGE], [3, 3, 5], [1, IMAGE, 6]]), torch.tensor([True, False, True])
        padding = Padding(3, frozenset())
        assert padding.token_lists(Prompt(ids, None, {}, rows)) == [[1, IMAGE], [1, IMAGE, 6]]
        mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0]])
        assert padding.token_lists(Prompt(ids, mask, {}, rows)) == [[3, 1, IMAGE], [IMAGE]]

    def test_prefixes_end_in_one_column(self):
        ids, mask = align_prefixes([[1], [2, 3]], [[5, 6, 7], [8]], 0, CPU)
        assert ids.tolist() == [[0, 1, 5, 6, 7], [2, 3, 0, 0, 8]]
        assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
        assert ids.dtype == mask.dtype == torch.int64

    def test_both_lie_where_the_model_does(self):
        ids, mask = align_prefixes([[1]], [[2]], 0, torch.device("meta"))
        assert ids.device.type == mask.device.type == "meta"
        assert {t.device.type for t in left_padded([[1]], 0, torch.device("meta"))} == {"meta"}

    def test_a_rest_of_another_row_is_no_row(self):
        with pytest.raises(ValueError, match="shorter"):
            align_prefixes([[1], [2]], [[3]], 0, CPU)

    def test_left_padding(self):
        ids, mask = left_padded([[1], [2, 3]], 9, CPU)
        assert ids.tolist() == [[9, 1], [2, 3]]
        assert mask.tolist() == [[0, 1], [1, 1]]


class TestPositionToCorrect:
    """A prompt of four tokens, of which the fourth is corrected in whichever forward it comes."""

    ROWS = torch.tensor([True, False])

    def at(self, fed, cached=None, name="input_ids"):
        cache = None if cached is None else SimpleNamespace(get_seq_length=lambda: cached)
        shape = (2, fed) if name == "input_ids" else (2, fed, 3)
        found = position_to_correct({name: torch.zeros(shape)}, cache, self.ROWS, 4)
        return None if found is None else found.tolist()

    @pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
    def test_where(self, name):
        assert self.at(4, name=name) == [3, -1]
        assert self.at(6, name=name) == [3, -1]  # without a cache the answer is fed again
        assert self.at(4, 0, name) == [3, -1]
        assert self.at(1, 3, name) == [0, -1]
        assert self.at(3, 2, name) == [1, -1]

    def test_not_in_this_forward(self):
        assert self.at(3) is None  # the first chunk
        assert self.at(1, 4) is None  # decoding
        assert self.at(3, 5) is None

    def test_ids_that_are_none(self):
        inputs = {"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 3)}
        assert position_to_correct(inputs, None, self.ROWS, 4).tolist() == [3, -1]


class Composer:
    """A template that ends its prompts with one token, or with nothing."""

    image_token_id = IMAGE

    def __init__(self, has_prompt_end=True):
        self.has_prompt_end = has_prompt_end

    def prompt_end(self, tokens):
        return max((i for i, t in enumerate(tokens) if t == END), default=None) if self.has_prompt_end else None


def ends(row, labels=None, mask=None, has_image=True, composer=None):
    ids = torch.tensor([row])
    mask = torch.ones_like(ids) if mask is None else torch.tensor([mask])
    labels = None if labels is None else torch.tensor([labels])
    (found,) = prompt_ends(composer or Composer(), ids, mask, torch.tensor([has_image]), labels)
    return found


class TestPromptEnds:
    def test_where_the_generation_prompt_ends(self):
        assert ends([IMAGE, 5, END, 6, 7]) == 2
        assert ends([IMAGE, 5, END, 6, END]) == 4
        assert ends([END, IMAGE, END, 6]) == 2

    def test_padding_is_not_counted(self):
        assert ends([0, 0, IMAGE, END, 6], mask=[0, 0, 1, 1, 1]) == 3
        assert ends([IMAGE, END, 6, END, 0], mask=[1, 1, 1, 0, 0]) == 1
        assert ends([IMAGE, END, 0, 6], mask=[1, 1, 0, 1]) == 1
        assert ends([IMAGE, END, 0, 6, END, 7], mask=[1, 1, 0, 1, 1, 1]) == 4

    def test_it_cannot_be_told(self):
        assert ends([IMAGE, 5, 6]) is None
        assert ends([END, 5, IMAGE, 6]) is None  # an earlier turn's: the image is not in view there
        assert ends([END, IMAGE]) is None

    def test_rows_without_an_image_are_not_corrected(self):
        assert ends([5, END, 6], has_image=False) == -1

    def test_of_every_row_its_own(self):
        ids = torch.tensor([[IMAGE, END, 6, 7], [5, END, 6, 7], [IMAGE, 5, END, 7], [IMAGE, 5, 6, 7]])
        found = prompt_ends(Composer(), ids, torch.ones_like(ids), torch.tensor([True, False, True, True]), None)
        assert found == [1, -1, 2, None]

    def test_an_answer_may_hold_what_looks_like_a_generation_prompt(self):
        row = [IMAGE, 5, END, 6, END, 7]
        assert ends(row) == 4
        assert ends(row, labels=[-100, -100, -100, 6, END, 7]) == 2

    def test_of_several_answers_the_last(self):
        row = [IMAGE, END, 6, 5, END, 7]
        assert ends(row, labels=[-100, -100, 6, -100, -100, 7]) == 4

    def test_labels_of_everything_tell_nothing_of_the_prompt(self):
        row = [IMAGE, 5, END, 6]
        assert ends(row, labels=row) == 2
        assert ends(row, labels=[-100] * 4) == 2

    def test_labels_that_begin_elsewhere_than_behind_the_generation_prompt(self):
        """As of a template whose mask has the role too: then the generation prompt tells."""
        assert ends([IMAGE, 5, END, 6], labels=[-100, -100, END, 6]) == 2

    def test_labels_of_padding_are_none(self):
        labels = [-100, -100, -100, 6, 0]
        assert ends([IMAGE, END, END, 6, 0], labels=labels, mask=[1, 1, 1, 1, 0]) == 2
        assert ends([0, IMAGE, END, 6, END], labels=[5, -100, -100, 6, END], mask=[0, 1, 1, 1, 1]) == 2

    def test_a_template_without_a_generation_prompt_needs_labels(self):
        bare = Composer(has_prompt_end=False)
        assert ends([IMAGE, 5, 6, 7], composer=bare) is None
        assert ends([IMAGE, 5, 6, 7], labels=[-100, -100, 6, 7], composer=bare) == 1
        assert ends([0, IMAGE, 5, 6], labels=[-100, -100, -100, 6], mask=[0, 1, 1, 1], composer=bare) == 2
        assert ends([IMAGE, 5, 6], labels=[-100, 5, 6], composer=bare) is None  # an image is never an answer's prompt alone


def test_the_last_entry_of_a_mask():
    assert last_true(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])).tolist() == [1, 3, 3]
    assert last_true(torch.tensor([[True, False]])).tolist() == [0]
    assert last_true(torch.ones(2, 3, device="meta")).device.type == "meta"  # where the mask lies


class TestByName:
    def call(self, *args, **kwargs):
        def method(self, inputs=None, config=None, *rest, only=None, **others):
            raise AssertionError

        return by_name(method, args, kwargs)

    def test_positional_arguments_get_their_names(self):
        assert self.call(1, 2, only=3) == {"inputs": 1, "config": 2, "only": 3}
        assert self.call() == {}
        assert self.call(1) == {"inputs": 1}

    def test_none_is_not_given(self):
        assert self.call(None, 2) == {"config": 2}
        assert self.call(None, inputs=1) == {"inputs": 1}
        assert self.call(1, inputs=None) == {"inputs": 1}

    def test_more_than_there_are(self):
        with pytest.raises(TypeError, match=r"^method\(\) takes at most 2 positional arguments, found 3\.$"):
            self.call(1, 2, 3)

    def test_twice(self):
        with pytest.raises(TypeError, match=r"^method\(\) got multiple values for argument 'config'\.$"):
            self.call(1, 2, config=0)
