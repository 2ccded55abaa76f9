"""Every config builds its model, its optimizer and one train step a phase, at full size, traced."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.aot import batch_shapes
from ovseg_jax.data.sources import SOURCES
from ovseg_jax.errors import UserError
from ovseg_jax.flags import read_config
from ovseg_jax.models.build import build_model, init_params
from ovseg_jax.optim import groups
from ovseg_jax.segmentation.benchmarks import FOLDER_FIELDS
from ovseg_jax.segmentation.protocol import Protocol, named_protocol
from ovseg_jax.train.config import changed_fields, complete, load_config, plain
from ovseg_jax.train.phases import make_phases
from ovseg_jax.train.step import Program

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "groupvit.py": ("", "own_text", "smoke"),
    "photos.py": ("", "gpu"),
    "quickstart.py": ("", "scratch", "contrastive", "entity", "mask", "both"),
    "vitb.py": ("", "smoke"),
    "vitb_cc12m.py": ("", "smoke"),
    "vitb_released.py": ("", "smoke"),
    "vits.py": ("", "smoke"),
}

# Parameters of the whole model, in units: a golden table that a change of architecture must edit.
PARAMETERS = {
    "groupvit.py": 144_569_617,
    "groupvit.py:own_text": 55_726_609,
    "photos.py": 48_144_706,
    "quickstart.py": 45_721_153,
    "quickstart.py:scratch": 10_493_761,
    "vitb.py": 207_694_081,
    "vitb_released.py": 235_745_673,
    "vits.py": 134_208_385,
}


def test_every_config_is_listed():
    assert {path.name for path in CONFIGS.glob("*.py")} == set(VARIANTS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_and_decay_of_word_vectors(name):
    """Words have none: those that no caption uses get no gradient, and would shrink to nothing."""
    config = load_config(f"{CONFIGS}/{name}")
    model = build_model(config.model)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]
    flat = groups.flatten(nn.unbox(shapes))
    phases = make_phases(config, records=4_300_000)
    trained = [groups.flatten(groups.split(nn.unbox(shapes), x.frozen)[0]) for x in phases]
    text = [paths for paths in trained if "text_encoder/word" in paths]
    assert bool(text) == (name not in ("quickstart.py", "photos.py"))  # whose text is frozen
    decay = groups.assign(list(flat), config.optimizer.decay_rules, "decay_rules")
    assert config.optimizer.weight_decay > 0
    assert decay["text_encoder/word"] == 0.0 and decay["text_projector/out/kernel"] == 1.0


def leaves(config):
    if not isinstance(config, ConfigDict | dict):
        return 1
    return sum(map(leaves, config.values()))


def test_a_config_names_what_differs():
    assert leaves(read_config(CONFIGS / "vitb.py")) <= 70
    assert leaves(load_config(CONFIGS / "vitb.py")) > 150
    named = {name: read_config(CONFIGS / f"{name}.py").eval.protocol for name in ("vitb", "vits")}
    assert all(dict(protocol) == {"name": "paper"} for protocol in named.values())
    for name, protocol in (("vitb", "paper"), ("vitb_released", "released"), ("groupvit",) * 2):
        filled = Protocol.from_config(load_config(CONFIGS / f"{name}.py").eval.protocol)
        assert filled == named_protocol(protocol)


def test_what_no_config_names_can_be_set():
    config = load_config(CONFIGS / "vitb.py", [("loss.mask_cost", "euclidean")])
    assert config.loss.mask_cost == "euclidean"
    with pytest.raises(UserError, match="did you mean 'model.image.drop_path'"):
        load_config(CONFIGS / "vitb.py", [("model.image.drop_pth", "0.1")])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("optimiser = {}", r"config.optimiser is no field; did you mean 'optimizer'\?"),
        ("loss.mask_weigth = 0.1", "config.loss.mask_weigth is no field"),
        ("eval.protocol.windw = 3", "config.eval.protocol.windw is no field; .* 'window'"),
        ("model.image.depht = 3", "config.model.image.depht = 3 is no field"),
        ("model.neck = 1", "config.model.neck = 1 is no field"),
        ("model.text_form = 'gpt'", "text_form is 'gpt'; it must be one of 'bert', 'causal'"),
        ("data = 3", "TypeError: Could not override field 'data'"),
        ("eval.voc.dir = 'data'", "AttributeError: .*voc"),
        ("model.image = {'patch': 16}", "config.model.image needs grid, width, heads"),
    ],
)
def test_fields_of_a_config_file_that_do_not_exist(tmp_path, fields, said):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ovseg_jax.flags import read_config\n\ndef get_config(variant=''):\n"
        f"    config = read_config({str(CONFIGS / 'vitb.py')!r})\n    config.{fields}\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=said) as error:
        load_config(path)
    assert str(error.value).count(str(path)) == 1


def test_saved_configs_of_earlier_versions_are_read():
    """They are complete, but for later fields, and may have fields that are gone."""
    config = load_config(CONFIGS / "vitb.py", [("log_every", "7")])
    saved = plain(config)
    saved["loss"]["contrast_chunk"] = 64
    saved["model"]["image"]["unroll"] = saved["model"]["text"]["unroll"] = 2
    saved["model"]["text"] |= {"position_offset": 0, "token_types": 2}
    saved["model"]["image"] |= {"binding_scale": None, "gumbel_temperature": 1.0}
    for name in ("image_head", "image_head_dropout"):
        del saved["model"][name]
    assert changed_fields(plain(complete(saved, saved=True)), plain(config)) == []
    saved["model"]["text"]["position_offset"] = 2  # RoBERTa
    with pytest.raises(UserError, match="position_offset = 2 is no field"):
        complete(saved, saved=True)


def test_cc12m_differs_in_its_records_alone():
    for variant in VARIANTS["vitb_cc12m.py"]:
        both = (load_config(f"{CONFIGS}/{name}.py:{variant}") for name in ("vitb", "vitb_cc12m"))
        (change,) = changed_fields(*map(plain, both))
        assert change.startswith("config.data.records.dir")


@pytest.fixture(scope="module")
def traced():
    """What was traced already: variants share most of their steps."""
    return set()


@pytest.mark.parametrize(
    "name",
    [
        f"{name}:{variant}".removesuffix(":")
        for name, variants in VARIANTS.items()
        for variant in variants
        if name != "vitb_cc12m.py"  # see `test_cc12m_differs_in_its_records_alone`
    ],
)
def test_every_phase_traces(name, traced):
    config = load_config(f"{CONFIGS}/{name}")
    model = build_model(config.model)
    assert config.data.source in SOURCES
    for benchmark, fields in FOLDER_FIELDS.items():
        assert config.eval[benchmark].to_dict() == fields
    Protocol.from_config(config.eval.protocol)
    phases = make_phases(config, records=4_300_000)
    program = Program(config=config, mesh=sharding.make_mesh(), model=model, phases=phases)
    for phase in phases:
        batch = batch_shapes(config, phase, 16, 24)
        groups_of_fields = (config.loss, config.optimizer, config.accumulation)
        # All that a step is traced from, but for the numbers of a learning rate.
        kind = repr([model, *map(plain, groups_of_fields), batch, phase.erase, phase.frozen])
        kind += repr([phase.mask_weight > 0, phase.schedule is None])
        if kind in traced:
            continue
        traced.add(kind)
        state = program.abstract_state(phase.frozen)
        new, metrics = jax.eval_shape(program.step(phase), state, batch)
        shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (new, state))
        assert next(shapes) == next(shapes)
        assert metrics["loss"].shape == ()
        assert ("mask" in metrics) == (phase.mask_weight > 0)
        assert ("nouns" in metrics) == (config.loss.noun_weight > 0)
        assert ("entity" in metrics) == (config.loss.entity_weight > 0)
