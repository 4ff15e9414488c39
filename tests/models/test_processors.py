"""An export has whatever its processor needs, and its processor is the base's, whatever transformers makes of the model_type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_families
import tiny_families_torchvision
import transformers
from tiny import save_tiny_llava
from transformers import AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from exporter.checkpoint.bake import copy_companion
from exporter.errors import InputError, VerificationError
from exporter.models.base import PARTS, PROCESSING, BaseFiles
from exporter.models.processors import check_same, load_processor, load_with_notices, pin
from exporter.models.recipe import load_recipe
from exporter.pipeline.plan import ExportOptions, make_plan

RECIPES = {"llava_next_vicuna": "llava_next", "pixtral": "llava"}
FAMILIES = {**tiny_families.FAMILIES, **tiny_families_torchvision.FAMILIES}


def settings(file: Path) -> dict:
    return json.loads(file.read_text())


def edit(file: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**(settings(file) if file.exists() else {}), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """base_of(family) -> its files without the weights, and its recipe."""
    made = {}

    def make(name):
        if name not in made:
            module = tiny_families if name in tiny_families.FAMILIES else tiny_families_torchvision
            family, folder = module.tiny_family(name), tmp_path_factory.mktemp(name) / "base"
            family.processor.save_pretrained(folder)
            family.model.config.save_pretrained(folder)
            made[name] = folder, load_recipe(family.recipe if family.recipe != "llava" else RECIPES.get(name, name))
        return made[name]

    return make


def exported(base: Path, to: Path) -> Path:
    """What an export has beside weights: the companions, and a config with a model_type of its own."""
    config = settings(base / "config.json")
    for companion in BaseFiles("base", None, base, config).companions:
        (to / companion).parent.mkdir(parents=True, exist_ok=True)
        copy_companion(base / companion, to / companion)
    (to / "config.json").write_text(json.dumps({**config, "model_type": f"shiftdc_{config['model_type']}"}))
    return to


def as_published(folder: Path, image_processor_type: str | None = None) -> None:
    """The layout of repositories older than transformers 5: a file for each part, and no class where the model_type tells it."""
    processor = settings(folder / "processor_config.json")
    images, videos = processor.pop("image_processor", None), processor.pop("video_processor", None)
    if images is not None:
        images |= {"image_processor_type": image_processor_type, "processor_class": processor["processor_class"]}
        edit(folder / "preprocessor_config.json", **images)
    if videos is not None:
        edit(folder / "video_preprocessor_config.json", **videos | {"video_processor_type": None})
    (folder / "processor_config.json").unlink()
    if rest := {k: v for k, v in processor.items() if k != "processor_class"}:
        edit(folder / "processor_config.json", **rest)


@pytest.mark.parametrize("published", [False, True], ids=["saved-now", "as-published"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_s_processor_is_the_same_in_an_export(base_of, tmp_path, name, published):
    folder, recipe = base_of(name)
    base = shutil.copytree(folder, tmp_path / "base")
    if published:
        as_published(base, "PixtralImageProcessor" if name == "pixtral" else None)  # a LLaVA's would be CLIP's
    processor = load_processor(base, recipe)
    export = exported(base, tmp_path / "export")
    pin(processor, export)
    check_same(processor, export, recipe)


@pytest.mark.parametrize("family", [tiny_families.aya_vision, tiny_families.idefics3])
def test_tags_that_are_ordinary_text(tmp_path, family):
    built, recipe = family(plain_tags=True), load_recipe(family.__name__)
    built.processor.save_pretrained(tmp_path / "base")
    built.model.config.save_pretrained(tmp_path / "base")
    processor, export = load_processor(tmp_path / "base", recipe), exported(tmp_path / "base", tmp_path / "export")
    assert len(processor.tokenizer("TILE_GLOBAL <global-img> <row_1_col_1>")["input_ids"]) > 8
    pin(processor, export)
    check_same(processor, export, recipe)


class TestTokenizerClass:
    """transformers takes tokenizer.json as it is for LLaVA's model_type, and another normalizer for any other."""

    @pytest.fixture
    def base(self, tmp_path):
        base = save_tiny_llava(tmp_path / "base")
        tokenizer = settings(base / "tokenizer.json")
        tokens = [f"<0x{i:02X}>" for i in range(256)]
        words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *tokens, *"\u2581abcdefghijklmnopqrstuvwxyzUSERANTIW?:0123456789"]
        # as published: a marker in front of every stretch of text between two tags
        tokenizer |= {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                ],
            },
            "pre_tokenizer": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": [], "unk_token": "<unk>", "fuse_unk": True,
                "byte_fallback": True,
            },
        }  # fmt: skip
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        edit(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False)
        return base

    def test_the_trap_is_there(self, base, tmp_path):
        export = exported(base, tmp_path / "export")
        one, other = (AutoTokenizer.from_pretrained(f)("<image>\nWhat")["input_ids"] for f in (base, export))
        assert one != other
        with pytest.raises(VerificationError, match="its tokenizer gives other tokens for the same text"):
            check_same(load_processor(base, load_recipe("llava")), export, load_recipe("llava"))

    def test_the_class_is_written_down(self, base, tmp_path):
        export, recipe = exported(base, tmp_path / "export"), load_recipe("llava")
        processor = load_processor(base, recipe)
        pin(processor, export)
        check_same(processor, export, recipe)
        assert settings(export / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
        one, other = (AutoTokenizer.from_pretrained(f)("<image>\nWhat")["input_ids"] for f in (base, export))
        assert one == other


class TestQFormer:
    def test_its_tokenizer_goes_along(self, base_of, tmp_path):
        folder, recipe = base_of("instructblip")
        export = exported(folder, tmp_path / "export")
        assert (export / "qformer_tokenizer" / "tokenizer.json").is_file()
        pin(load_processor(folder, recipe), export)
        one, other = (AutoProcessor.from_pretrained(f).qformer_tokenizer("A chair") for f in (folder, export))
        assert one["input_ids"] == other["input_ids"]

    def test_without_it_nothing_is_measured(self, base_of, tmp_path):
        folder, recipe = base_of("instructblip")
        base = shutil.copytree(folder, tmp_path / "base")
        shutil.rmtree(base / "qformer_tokenizer")
        with pytest.raises(InputError, match=r"Could not load tokenizer from subfolder.*restore its folder qformer_tokenizer"):
            load_processor(base, recipe)

    def test_a_class_of_the_video_model(self, base_of, tmp_path):
        """So processor_config.json of Salesforce/instructblip-vicuna-7b (commit 9e554774)."""
        folder, recipe = base_of("instructblip")
        base = shutil.copytree(folder, tmp_path / "base")
        edit(base / "processor_config.json", processor_class="InstructBlipVideoProcessor")
        processor, notices = load_with_notices(base, recipe)
        assert type(processor).__name__ == "InstructBlipProcessor"
        assert any("name the processor class InstructBlipVideoProcessor" in n for n in notices)
        export = exported(base, tmp_path / "export")
        pin(processor, export)
        assert type(AutoProcessor.from_pretrained(export)).__name__ == "InstructBlipProcessor"
        check_same(processor, export, recipe)


class TestDifferences:
    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: edit(f / "processor_config.json", chat_template="{{ 1 }}"), "its chat template is another"),
            (lambda f: edit(f / "processor_config.json", num_additional_image_tokens=2), "differs in attention_mask, input_ids"),
            (lambda f: edit(f / "tokenizer_config.json", bos_token="</s>"), "its tokenizer"),
        ],
    )
    def test_of_files(self, base_of, tmp_path, base_folder, break_it, message):
        export, recipe = exported(base_folder, tmp_path / "export"), load_recipe("llava")
        processor = load_processor(base_folder, recipe)
        check_same(processor, export, recipe)
        (export / "chat_template.jinja").unlink() if "template" in message else None
        break_it(export)
        with pytest.raises(VerificationError, match=message):
            check_same(processor, export, recipe)

    def test_of_pixels(self, tmp_path, base_folder):
        export, recipe = exported(base_folder, tmp_path / "export"), load_recipe("llava")
        values = settings(export / "processor_config.json")
        values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
        (export / "processor_config.json").write_text(json.dumps(values))
        with pytest.raises(VerificationError, match=r"its image_processor is a .* with other settings"):
            check_same(load_processor(base_folder, recipe), export, recipe)


class TestMissingClass:
    def test_it_is_named(self, base_folder, tmp_path):
        base = shutil.copytree(base_folder, tmp_path / "base")
        edit(base / "processor_config.json", processor_class="MyVLProcessor")
        with pytest.raises(InputError, match=r"name the processor class MyVLProcessor, which transformers .* has not"):
            make_plan(str(base), ExportOptions.of(output=tmp_path / "out"))

    def test_none_is_named(self, base_folder, tmp_path):
        base = shutil.copytree(base_folder, tmp_path / "base")
        (base / "processor_config.json").unlink()
        with pytest.raises(InputError, match=r"the processor in .* cannot be loaded|has no processor of images and text"):
            make_plan(str(base), ExportOptions.of(output=tmp_path / "out"))


def test_settings_that_nothing_takes_are_told(base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    edit(base / "processor_config.json", fake_image_token="<image>", image_seq_length=4)
    _, notices = load_with_notices(base, load_recipe("llava"))
    assert notices == (
        "processor_config.json has settings that LlavaProcessor does not take: fake_image_token, image_seq_length",
    )


def processor_classes() -> list[type[ProcessorMixin]]:
    found = (getattr(transformers, name) for name in dir(transformers) if name.endswith("Processor"))
    return [c for c in found if isinstance(c, type) and issubclass(c, ProcessorMixin) and c is not ProcessorMixin]


def test_folders_of_every_processor_in_transformers_are_known():
    """Tokenizers but the first are in folders of their names; other parts used to be."""
    assert len(processor_classes()) > 50
    names = {a for c in processor_classes() for a in c.get_attributes()}
    assert {"qformer_tokenizer", "video_processor"} <= names
    assert not [n for n in names if not any(Path(n).match(pattern) for pattern in PARTS)]


#: Tokenizers that published checkpoints of the families name, or that transformers takes for their model_types.
NAMED = (
    "LlamaTokenizer",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "CohereTokenizer",
    "GPT2Tokenizer",
    "BertTokenizer",
    "TokenizersBackend",
)


def test_vocabularies_of_every_family_s_tokenizer_are_known():
    classes = [getattr(transformers, name) for name in NAMED]
    files = {f for c in classes for f in (getattr(c, "vocab_files_names", None) or {}).values()}
    assert {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"} <= files
    assert not [f for f in files if not any(Path(f).match(pattern) for pattern in PROCESSING)]
