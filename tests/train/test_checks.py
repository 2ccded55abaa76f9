"""What a config asks for and cannot have: every refusal names the field and what to do."""

import pytest
import runs
from data.benchmarks import miniatures

from ovseg_jax import sharding
from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.train.checks import check_loop, check_losses, check_model, check_phases
from ovseg_jax.train.config import load_config
from ovseg_jax.train.loop import images_to_choose_on
from ovseg_jax.train.phases import make_phases

CROP = {"kind": "crop", "size": 32}
ERASE = {**CROP, "erase": {"probability": 0.25}}
RESTARTS = runs.ROOT / "tests" / "tiny.py:restarts"


@pytest.fixture
def config(tiny_config):
    """The tiny config with data, and two phases of which the second has the mask loss."""
    tiny_config.data.update(transform=CROP, nouns=0, cache_texts=False, cache_images=False)
    tiny_config.phases = (
        {"steps": 5, "batch_size": 16},
        {"steps": 5, "batch_size": 16, "mask_weight": 0.1},
    )
    return tiny_config.unlock()


def set_fields(config, changes):
    with config.ignore_type():
        for key, value in changes.items():
            *parts, name = key.split(".")
            place = config
            for part in parts:
                place = place[int(part) if part.isdigit() else part]
            place[name] = value
    return config


BINDING = {"loss.mask_maps": "binding", "loss.mask_directions": "one"}
NOUNS = {"loss.masking": "multi_label", "data.nouns": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss.mask_directions": "first"}, "'both', 'one'"),
        ({"loss.matching": "hungarian"}, "config.loss.matching is .*; .* 'host', 'device'"),
        ({"loss.masking": "entities"}, "'single_entity'"),
        ({**BINDING, "loss.mask_maps": "final_tokens"}, "needs mask_maps = 'binding'"),
        ({"loss.noun_weight": 1.0}, "config.data.nouns"),
        ({"data.nouns": 3, "data.cache_texts": True}, "cache_texts"),
        ({"loss.masking": "single_entity", "loss.entity_weight": 0.0}, "no effect"),
        ({"loss.masking": "single_entity", "data.cache_texts": True}, "cache_texts"),
        ({"loss.masking": "all_nouns", "model.decoder": None}, "decoder"),
        ({"loss.masking": "multi_label"}, "config.data.nouns"),
        ({**NOUNS, "loss.noun_weight": 1.0}, "noun_weight"),
    ],
)
def test_losses_that_do_not_fit(config, changes, said):
    check_losses(config)
    with pytest.raises(UserError, match=said):
        check_losses(set_fields(config, changes))


@pytest.mark.parametrize(
    ("changes", "mask_id", "said"),
    [
        ({"loss.masking": "mlm", "model.token_classes": 3}, 9, "token_classes = 5"),
        ({"loss.masking": "mlm", "model.token_classes_from": "decoder"}, 9, "'text'"),
        ({"loss.masking": "mlm_groups"}, 9, "'decoder'"),
        ({"loss.masking": "mlm"}, -1, "mask token"),
        ({"model.neck_init": "standard"}, 9, "neck_init"),
        ({"model.text.vocab_size": 4}, 9, "has 5 tokens"),
        ({"model.pad_id": 1}, 9, "pads with token 0"),
        ({"data.cache_texts": True, "model.projector_norm": "batch"}, -1, "cache_texts = F"),
    ],
)
def test_models_that_do_not_fit(config, tmp_path, changes, mask_id, said):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    config.model.update(token_classes=5, token_classes_from="text")
    tokenizer = Tokenizer(tmp_path)
    tokenizer.mask_id = mask_id
    check_model(config, tokenizer, 5)
    with pytest.raises(UserError, match=said):
        check_model(set_fields(config, changes), tokenizer, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulation.micro_batches": 0}, "must be at least 1"),
        ({"accumulation.micro_batches": 2, "model.projector_norm": "batch"}, "batch norms"),
        ({"accumulation.micro_batches": 3}, "does not divide into 3 micro-batches on 8"),
        ({"loss.matching": "enumerate", "model.image.num_groups": 40}, "'enumerate' takes at most"),
        ({"data.cache_images": True, "phases.1.transform": {**CROP, "size": 16}}, "the same tr"),
        ({"data.cache_images": True, "data.transform": ERASE}, "erase"),
        (
            {"phases.1.start_from": "best", "eval.every": 0},
            r"\[1\].start_from is 'best', but no",
        ),
        (
            {"phases.1.start_from": "best", "eval.every": 6},
            r"\[1\].start_from is 'best', but no",
        ),
        ({"loss.group_ratio": 0.1}, "config.loss.group_ratio = 0.1 keeps 0 of 4 groups"),
        ({"loss.group_ratio": 2.0}, "config.loss.group_ratio = 2.0 keeps 8 of 4 groups"),
    ],
)
def test_phases_that_cannot_be_computed(config, changes, said):
    config.eval.every = 5
    check_phases(config, make_phases(config, 100), sharding.make_mesh())
    set_fields(config, changes)
    with pytest.raises(UserError, match=said):
        check_phases(config, make_phases(config, 100), sharding.make_mesh())


def test_batches_of_every_phase_must_divide_before_the_first_begins(config):
    """As where a run goes on with another number of devices."""
    config.phases[1]["batch_size"] = 20
    phases = make_phases(config, records=100)
    check_phases(config, phases, sharding.make_mesh(2, 2, 2))
    with pytest.raises(UserError, match=r"phases\[1\].batch_size = 20 .* 8 .*: give 16 or 24,"):
        check_phases(config, phases, sharding.make_mesh())


def test_numbers_of_steps_and_seconds():
    config = load_config(RESTARTS)
    for key, value in (("log_every", 0), ("hang_seconds", -1.0), ("eval.every", -1)):
        changed = set_fields(config.copy_and_resolve_references(), {key: value})
        with pytest.raises(UserError, match=f"config.{key} is {value}; it must be at least"):
            check_loop(changed)


def test_evaluations_that_are_missing():
    config = load_config(RESTARTS)
    check_loop(config)
    for changes, said in (
        ({}, "config.eval.every needs a benchmark"),
        ({"benchmarks": ("voc_zss", "scenes")}, "benchmark voc_zss has none"),
        ({"benchmarks": ("scenes",), "calibrate": False}, "set config.eval.calibrate = True"),
    ):
        config.eval.update(changes)
        with pytest.raises(UserError, match=said):
            images_to_choose_on(config.eval)
    config.eval.calibrate = True
    images_to_choose_on(config.eval)
    config.eval.weights = "none"
    with pytest.raises(UserError, match=r"config.eval.weights is 'none'"):
        check_loop(config)


def test_the_released_recipe_says_what_it_chooses_on(tmp_path):
    config = load_config(runs.ROOT / "configs" / "vitb_released.py").eval
    with pytest.raises(UserError, match="config.eval.voc.dir"):
        images_to_choose_on(config)
    miniatures.voc(tmp_path)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    config.voc.dir = str(tmp_path)
    with pytest.raises(UserError, match="Segmentation/train.txt"):
        images_to_choose_on(config)
    miniatures.write_text(base / "ImageSets" / "Segmentation" / "train.txt", "2008_000001")
    mask = miniatures.values_of([0, 1, 255])
    miniatures.write_mask(base / "SegmentationClass" / "2008_000001.png", mask, palette=True)
    assert len(images_to_choose_on(config)) == 1
