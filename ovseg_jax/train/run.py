"""Everything a run is made of, put together from its config once."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ovseg_jax import processes, sharding
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.masking import Masking, masked_texts
from ovseg_jax.data.pipeline import Loader, make_loader
from ovseg_jax.data.records import RecordSource, sample_captions
from ovseg_jax.data.sources import make_source, missing_data
from ovseg_jax.data.templates import chosen
from ovseg_jax.data.tokens import Tokenizer, find_tokenizer, text_length
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.optim import groups
from ovseg_jax.progress import Progress, table
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.shapes import Int
from ovseg_jax.train import feature_cache
from ovseg_jax.train.accumulate import check_accumulation
from ovseg_jax.train.entity_terms import check_entity_config, masking_of
from ovseg_jax.train.mask_terms import check_mask_config, check_matching
from ovseg_jax.train.neck import standardized_neck
from ovseg_jax.train.noun_terms import check_noun_config
from ovseg_jax.train.phases import (
    Phase,
    check_batch_sizes,
    check_cached_images,
    make_phases,
    weak_phases,
)
from ovseg_jax.train.program import Program, boxed_params
from ovseg_jax.train.terms import check_contrast_config
from ovseg_jax.weights.initialize import TRUNK, init_params, init_statistics, published_start
from ovseg_jax.weights.locate import find_weights

# Captions looked at to choose the text length.
LENGTH_SAMPLE = 20_000


@dataclass
class Run(Program):
    """A run's fixed parts: its program, its data and who reports. Build one with `make_run`."""

    tokenizer: Tokenizer
    source: RecordSource
    entities: EntitySet
    text_length: int
    progress: Progress
    stores: dict[str, FeatureStore] = field(default_factory=dict)

    def initial_params(self, announce: bool = True) -> dict[str, Any]:
        """Random parameters from the seed, published weights laid over them, sharded.

        Args:
          announce: say which parameters start from what.
        """
        make = jax.jit(
            lambda key: nn.unbox(init_params(self.model, key)), out_shardings=self.param_shardings
        )
        flat = groups.flatten(make(jax.random.key(self.config.seed)))
        shapes = {path: leaf.shape for path, leaf in flat.items()}
        where = groups.flatten(self.param_shardings)
        start = published_start(self.config.model, shapes)
        if announce:
            notes = [f"note: {remark}" for remark in start.remarks]
            self.progress.say("\n".join([table(start.rows), *notes]))
        for path, value in start.values.items():
            flat[path] = jax.device_put(value, where[path])
        params = groups.nest(flat)
        if self.config.model.neck_init == "standardize":
            transform = self.phases[0].transform
            return standardized_neck(self.model, params, self.source, transform, self.config.seed)
        return params

    def templates(self) -> tuple[str, ...]:
        """The prompt templates of training; the first few where texts are cached."""
        return _templates(self.config.data)

    def loader(self, phase: Phase, first_step: int) -> Loader:
        """This process's rows of the batches from a global step to the end of the phase."""
        data = self.config.data
        return make_loader(
            self.source,
            self.entities,
            self.tokenizer,
            {
                "text_length": self.text_length,
                "transform": phase.transform,
                "templates": self.templates(),
                "nouns": data.nouns,
                "masking": masking_of(self.config.loss),
            },
            batch_size=phase.batch_size,
            seed=self.config.seed,
            first_step=first_step,
            last_step=phase.last,
            first_position=phase.position(first_step),
            with_pairs=phase.mask_weight > 0,
            slots=sharding.process_slots(phase.batch_size, self.mesh),
            image_store=self.stores.get("images"),
            text_store=self.stores.get("texts"),
            workers=data.workers,
            threads=data.threads,
        )

    def fill_caches(self, params: Any) -> None:
        """Computes (or finds) the feature caches that the config asks for."""
        data, cache = self.config.data, Path(self.config.data.cache_dir)
        if jax.process_count() > 1:
            # Each process fills its own: they may share the folder, and need not be equally far.
            cache /= f"process_{jax.process_index()}"
            params = processes.local(params)
        if data.cache_texts and self.config.model.projector_norm == "batch":
            raise UserError(
                "config.data.cache_texts keeps sentence vectors alone, but a batch norm "
                "(config.model.projector_norm = 'batch') also sees all tokens in training: set "
                "config.data.cache_texts = False"
            )
        if data.cache_images:
            self._check_frozen(TRUNK, "cache_images", params)
            self.stores["images"] = feature_cache.image_store(
                cache,
                self.model,
                params,
                self.source,
                self.phases[0].transform,
                views=data.cached_views,
                seed=self.config.seed,
                progress=self.progress.count,
            )
        if data.cache_texts:
            self._check_frozen(("text_encoder/",), "cache_texts", params)
            self.stores["texts"] = feature_cache.text_store(
                cache,
                self.model,
                params,
                self.source,
                self.entities,
                self.tokenizer,
                self.templates(),
                length=self.text_length,
                progress=self.progress.count,
            )

    def _check_frozen(self, prefixes: tuple[str, ...], option: str, params: Any) -> None:
        for phase in self.phases:
            trainable, _ = groups.split(params, phase.frozen)
            moving = [path for path in groups.flatten(trainable) if path.startswith(prefixes)]
            if moving:
                raise UserError(
                    f"config.data.{option} needs these parameters frozen in every phase, but "
                    f"config.phases[{phase.index}].frozen leaves {moving[0]} (and "
                    f"{len(moving) - 1} more) to train"
                )

    def segmenter(
        self, params: Any, protocol: Protocol, batch_stats: Mapping[str, Any] | None = None
    ) -> ModelSegmenter:
        """The model for evaluation: where there are several processes, each one's own copy.

        Args:
          params: its parameters. batch_stats: its running statistics, those at the start of
            training where None.
        """
        statistics = init_statistics(self.model) if batch_stats is None else batch_stats
        mesh = self.mesh
        if jax.process_count() > 1:
            # Only then can one process draw pictures while the others are done.
            mesh = sharding.make_mesh(devices=jax.local_devices())
            params, statistics = jax.device_put(
                processes.local((params, statistics)), sharding.replicated(mesh)
            )
        return ModelSegmenter(
            self.model,
            params,
            self.tokenizer,
            text_length=self.prompt_length(),
            protocol=protocol,
            batch_stats=statistics,
            mesh=mesh,
        )

    def prompt_length(self) -> int:
        """Tokens that class prompts are padded to: room for a few words of name."""
        return max(16, self.text_length)


def make_run(config: ConfigDict, progress: Progress) -> Run:
    """Builds the fixed parts of a run.

    Raises:
      UserError: anything that the config asks for is missing (all of it in one message) or wrong.
    """
    missing = missing_data(config.data) + _missing_weights(config)
    if missing:
        raise UserError(
            "this config needs what is not here:\n  - "
            + "\n  - ".join(missing)
            + "\nWithout data and weights, try the variant that needs neither: "
            "--config=configs/vitb.py:smoke, or --config=configs/quickstart.py"
        )
    if config.model.neck_init not in ("", "standardize"):
        raise UserError(
            f"config.model.neck_init is {config.model.neck_init!r}; it must be standardize or empty"
        )
    check_contrast_config(config.loss)
    check_mask_config(config.loss)
    check_noun_config(config)
    masking_of(config.loss)
    mesh = sharding.make_mesh(**config.mesh)
    model = build_model(config.model)
    tokenizer = find_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, "
            f"config.model.text.vocab_size is {config.model.text.vocab_size}"
        )
    if tokenizer.pad_id != config.model.pad_id:
        raise UserError(
            f"the tokenizer {config.data.tokenizer!r} pads with token {tokenizer.pad_id}, "
            f"config.model.pad_id is {config.model.pad_id}"
        )
    source, entities = make_source(config.data)
    check_entity_config(config, tokenizer.mask_id, len(entities))
    longest = max(_templates(config.data), key=len)
    counts = _sampled_lengths(source, entities, tokenizer, masking_of(config.loss), longest)
    length = config.data.text_length or text_length(counts)
    if cut := int((counts > length).sum()):
        progress.say(
            f"note: {cut} of {len(counts)} sampled sentences are longer than {length} tokens and "
            "are cut (config.data.text_length)"
        )
    if length > config.model.text.max_positions:
        raise UserError(
            f"config.data.text_length = {length}, but the text encoder has positions for "
            f"{config.model.text.max_positions} tokens (config.model.text.max_positions)"
        )
    phases = make_phases(config, len(source))
    check_batch_sizes(phases, mesh)
    check_accumulation(config, phases, mesh)
    if any(phase.mask_weight > 0 for phase in phases):
        check_matching(config)
    if config.data.cache_images:
        check_cached_images(phases)
    for line in weak_phases(config, phases):
        progress.say(line)
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        source=source,
        entities=entities,
        phases=phases,
        text_length=length,
        progress=progress,
        param_shardings=sharding.parameter_shardings(boxed_params(model), mesh),
    )


def _missing_weights(config: ConfigDict) -> list[str]:
    missing = []
    for field_name in ("image", "text"):
        spec = config.model[f"{field_name}_init"]
        try:
            if spec:
                find_weights(spec, f"config.model.{field_name}_init")
        except UserError as error:
            missing.append(
                f"{error}; an empty string (--config.model.{field_name}_init=) starts from "
                "random weights"
            )
    try:
        find_tokenizer(config.data.tokenizer)
    except UserError as error:
        missing.append(f"config.data.tokenizer: {error}")
    return missing


def _templates(data: ConfigDict) -> tuple[str, ...]:
    templates = chosen(data.templates)
    return templates[: data.cached_templates] if data.cache_texts else templates


def _sampled_lengths(
    source: RecordSource,
    entities: EntitySet,
    tokenizer: Tokenizer,
    masking: Masking,
    template: str,
) -> Int[np.ndarray, "sentences"]:
    """Tokens of each sentence that some of the captions give, prompts in the one `template`."""
    # Other objectives name no more in a prompt than all of a caption's entities.
    masking = masking if masking is Masking.ALL_NOUNS else Masking.ALL_ENTITIES
    sentences = []
    for caption in sample_captions(source, LENGTH_SAMPLE):
        texts = masked_texts(caption, entities, template, masking, np.random.default_rng(0))
        sentences += [caption, texts.masked, texts.prompt]
    return tokenizer.lengths(sentences)


def config_hash(config: ConfigDict) -> str:
    """Short hash of a resolved config."""
    return hashlib.sha256(config.to_json_best_effort(sort_keys=True).encode()).hexdigest()[:12]
