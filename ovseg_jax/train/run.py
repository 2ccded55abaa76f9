"""Everything a run is made of, put together from its config once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ovseg_jax import processes, sharding
from ovseg_jax.data.captions import Masking, masked_texts
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Loader
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.records import RecordSource, sample_captions
from ovseg_jax.data.sources import make_source, missing_data
from ovseg_jax.data.tokenizer import Tokenizer, expand_templates, find_tokenizer, text_length
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, init_params, init_statistics
from ovseg_jax.optim import groups
from ovseg_jax.progress import Progress, table
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ModelSegmenter
from ovseg_jax.train import checks
from ovseg_jax.train.features import image_store, standardized_neck, text_store
from ovseg_jax.train.phases import Phase, make_phases, weak_phases
from ovseg_jax.train.step import Program
from ovseg_jax.weights.initialize import TRUNK, published_start

# Captions looked at to choose the text length.
LENGTH_SAMPLE = 20_000


@dataclass(kw_only=True)
class Run(Program):
    """The fixed parts of a run: its program and its data. Built by `make_run`."""

    tokenizer: Tokenizer
    source: RecordSource
    entities: EntitySet
    text_length: int
    progress: Progress
    stores: dict[str, FeatureStore] = field(default_factory=dict)

    def initial_params(self, announce: bool = True) -> dict[str, Any]:
        """Random parameters from the seed, with published weights in their place, sharded."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        make = jax.jit(lambda key: nn.unbox(init_params(self.model, key)), out_shardings=shardings)
        flat = groups.flatten(make(jax.random.key(self.config.seed)))
        start = published_start(self.config.model, {path: x.shape for path, x in flat.items()})
        if announce:
            notes = [f"note: {remark}" for remark in start.remarks]
            self.progress.say("\n".join([table(start.rows), *notes]))
        for path, value in start.values.items():
            flat[path] = jax.device_put(value, flat[path].sharding)
        params = groups.nest(flat)
        if self.config.model.neck_init == "standardize":
            transform = self.phases[0].transform
            return standardized_neck(self.model, params, self.source, transform, self.config.seed)
        return params

    def loader(self, phase: Phase, first_step: int) -> Loader:
        """This process's rows of the batches from a global step to the end of the phase."""
        data = self.config.data
        return Loader(
            self.source,
            self.entities,
            self.tokenizer,
            {
                "text_length": self.text_length,
                "transform": phase.transform,
                "templates": _templates(data),
                "nouns": data.nouns,
                "masking": Masking(self.config.loss.masking),
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
        """Opens or computes the feature caches that the config asks for."""
        data, cache = self.config.data, Path(self.config.data.cache_dir)
        if jax.process_count() > 1:
            # Each process fills one: they may share the folder, at different speeds.
            cache /= f"process_{jax.process_index()}"
            params = processes.local(params)
        common = (cache, self.model, params, self.source)
        if data.cache_images:
            self._check_frozen(TRUNK, "cache_images", params)
            self.stores["images"] = image_store(
                *common,
                self.phases[0].transform,
                views=data.cached_views,
                seed=self.config.seed,
                progress=self.progress.count,
            )
        if data.cache_texts:
            self._check_frozen(("text_encoder/",), "cache_texts", params)
            self.stores["texts"] = text_store(
                *common,
                self.entities,
                self.tokenizer,
                _templates(data),
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
        """The model for evaluation; where there are several processes, each has a copy."""
        statistics = init_statistics(self.model) if batch_stats is None else batch_stats
        mesh = self.mesh
        if jax.process_count() > 1:
            # So that one process can draw pictures while the others are done.
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
        """Tokens that class prompts are padded to: room for names of a few words."""
        return max(16, self.text_length)


def make_run(config: ConfigDict, progress: Progress) -> Run:
    """Builds the fixed parts of a run.

    Raises:
      UserError: something that the config asks for is missing (all in one message) or wrong.
    """
    checks.check_files(config, missing_data(config.data))
    checks.check_losses(config)
    mesh = sharding.make_mesh(**config.mesh)
    model, tokenizer = build_model(config.model), find_tokenizer(config.data.tokenizer)
    source, entities = make_source(config.data)
    checks.check_model(config, tokenizer, len(entities))
    length = _text_length(config, source, entities, tokenizer, progress)
    phases = make_phases(config, len(source))
    checks.check_phases(config, phases, mesh)
    for line in weak_phases(config, phases):
        progress.say(line)
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        phases=phases,
        data={"records": len(source), "data": source.fingerprint(), "text_length": length},
        tokenizer=tokenizer,
        source=source,
        entities=entities,
        text_length=length,
        progress=progress,
    )


def _templates(data: ConfigDict) -> tuple[str, ...]:
    """The prompt templates of training; where texts are cached, the first few."""
    templates = expand_templates(data.templates)
    return templates[: data.cached_templates] if data.cache_texts else templates


def _text_length(
    config: ConfigDict,
    source: RecordSource,
    entities: EntitySet,
    tokenizer: Tokenizer,
    progress: Progress,
) -> int:
    """Tokens that texts are padded to, by the config or by a sample of the captions."""
    template = max(_templates(config.data), key=len)
    # No other objective names more in a prompt than all of a caption's entities.
    all_nouns = Masking(config.loss.masking) is Masking.ALL_NOUNS
    masking = Masking.ALL_NOUNS if all_nouns else Masking.ALL_ENTITIES
    sentences = []
    for caption in sample_captions(source, LENGTH_SAMPLE):
        texts = masked_texts(caption, entities, template, masking, np.random.default_rng(0))
        sentences += [caption, texts.masked, texts.prompt]
    counts = tokenizer.lengths(sentences)
    length = config.data.text_length or text_length(counts)
    if cut := int((counts > length).sum()):
        progress.say(
            f"note: {cut} of {len(counts)} sampled sentences are longer than {length} tokens and "
            "are cut (config.data.text_length)"
        )
    checks.check_text_length(config, length)
    return length
