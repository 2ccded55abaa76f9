"""What a config asks for and cannot have: every refusal before the first step, in one place.

Training and ahead-of-time compilation both call `check_losses` and `check_phases`; training adds
what depends on data and weights. All of them raise UserError, which says what to change.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from ovseg_jax.data.captions import Masking
from ovseg_jax.data.tokenizer import Tokenizer, find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.losses.mask_consistency import subgroup_count
from ovseg_jax.losses.matching import BACKENDS, ENUMERATE_LIMIT
from ovseg_jax.losses.released_mask_consistency import COSTS
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.sharding import AnyMesh, batch_shards
from ovseg_jax.train.phases import Phase
from ovseg_jax.weights.weight_files import find_weights

LOSS_CHOICES = {
    "masking": tuple(masking.value for masking in Masking),
    "cross_image": ("masks", "groups"),
    "mask_maps": ("final_tokens", "binding"),
    "mask_directions": ("both", "one"),
    "mask_cost": COSTS,
    "matching": BACKENDS,
}
LEAST = {"log_every": 1, "checkpoint_every": 1, "max_skipped": 1, "hang_seconds": 0}


def check_losses(config: ConfigDict) -> None:
    """Refuses losses that cannot be computed, whatever the data are."""
    loss, data = config.loss, config.data
    for name, allowed in LOSS_CHOICES.items():
        if loss[name] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise UserError(f"config.loss.{name} is {loss[name]!r}; it must be one of {listed}")
    masks = loss.cross_image == "masks"
    if masks and loss.mask_maps == "final_tokens" and loss.mask_directions == "one":
        raise UserError("config.loss.mask_directions = 'one' needs mask_maps = 'binding'")
    if loss.noun_weight and not data.nouns:
        raise UserError("config.loss.noun_weight > 0 needs nouns: set config.data.nouns, e.g. to 3")
    if data.nouns and data.cache_texts:
        raise UserError("config.data.nouns are not cached: set config.data.cache_texts = False")
    masking = Masking(loss.masking)
    usual, where = masking is Masking.ALL_ENTITIES, f"config.loss.masking = {masking.value!r}"
    if loss.entity_weight <= 0:
        if not usual:
            raise UserError(f"{where} has no effect with config.loss.entity_weight = 0")
        return
    if masking.needs_decoder and config.model.decoder is None:
        raise UserError(
            "config.loss.entity_weight > 0 needs an entity decoder, but config.model.decoder is "
            "None: set config.loss.entity_weight = 0"
        )
    if data.cache_texts and not usual:
        raise UserError(f"{where} is not cached: set config.data.cache_texts = False")
    if masking is Masking.MULTI_LABEL and (not data.nouns or loss.noun_weight):
        raise UserError(f"{where} needs config.data.nouns, e.g. 3, and config.loss.noun_weight = 0")


def check_phases(config: ConfigDict, phases: Sequence[Phase], mesh: AnyMesh) -> None:
    """Refuses phases that mesh, matching, caches, evaluations or accumulation cannot serve."""
    shards, count = batch_shards(mesh), config.accumulation.micro_batches
    image, loss, cached = config.model.image, config.loss, config.data.cache_images
    if count < 1:
        raise UserError("config.accumulation.micro_batches must be at least 1")
    if count > 1 and config.model.projector_norm == "batch":
        raise UserError(
            "config.accumulation.micro_batches > 1 cannot be exact with batch norms "
            "(config.model.projector_norm = 'batch'), which see one micro-batch at a time: set it "
            "to 1"
        )
    for phase in phases:
        where = f"config.phases[{phase.index}].batch_size = {phase.batch_size} does not divide "
        if rest := phase.batch_size % shards:
            below = phase.batch_size - rest
            near = f"{below} or {below + shards}" if below else str(shards)
            raise UserError(
                f"{where}over {shards} batch shards (config.mesh: data x fsdp on {mesh.size} "
                f"devices): give {near}, or another config.mesh or number of devices"
            )
        if phase.batch_size % (count * shards):
            raise UserError(f"{where}into {count} micro-batches on {shards} batch shards")
        every = config.eval.every
        if phase.start_from == "best" and not 0 < every <= phase.first:
            raise UserError(
                f"config.phases[{phase.index}].start_from is 'best', but no evaluation comes "
                f"before its first step ({phase.first}): set config.eval.every, now {every}"
            )
        if cached and phase.transform != phases[0].transform:
            raise UserError("config.data.cache_images needs the same transform in all phases")
    if cached and phases[0].erase:
        raise UserError(
            "config.data.cache_images holds features, of which nothing can be erased: set it to "
            "False, or config.data.transform.erase.probability to 0.0"
        )
    if all(phase.mask_weight <= 0 for phase in phases):
        return
    groups = image.later_stages[-1][1] if image.later_stages else image.num_groups
    masks = loss.cross_image == "masks"
    # On the maps of the binding all groups are matched.
    whole = masks and loss.mask_maps == "binding"
    matched = groups if whole else subgroup_count(groups, loss.group_ratio)
    if masks and loss.matching == "enumerate" and matched > ENUMERATE_LIMIT:
        raise UserError(
            f"config.loss.matching = 'enumerate' takes at most {ENUMERATE_LIMIT} groups, but "
            f"{matched} of {groups} are matched (config.loss.group_ratio): set it to 'host' or "
            "'device'"
        )


def check_text_length(config: ConfigDict, length: int) -> None:
    """Refuses texts of more tokens than the text encoder has positions for."""
    most = config.model.text.max_positions
    if length > most:
        raise UserError(
            f"config.data.text_length = {length}, but the text encoder has positions for {most} "
            "tokens (config.model.text.max_positions)"
        )


# ---- training alone


def check_files(config: ConfigDict, missing: Sequence[str]) -> None:
    """Refuses a config whose data (`missing`), weights or tokenizer are not here, all at once."""
    missing = list(missing)
    for name in ("image_init", "text_init"):
        try:
            if config.model[name]:
                find_weights(config.model[name], f"config.model.{name}")
        except UserError as error:
            start = f"an empty string (--config.model.{name}=) starts from random weights"
            missing.append(f"{error}; {start}")
    try:
        find_tokenizer(config.data.tokenizer)
    except UserError as error:
        missing.append(f"config.data.tokenizer: {error}")
    if missing:
        raise UserError(
            "\n  - ".join(["this config needs what is not here:", *missing])
            + "\nWithout data and weights, try the variant that needs neither: "
            "--config=configs/vitb.py:smoke, or --config=configs/quickstart.py"
        )


def check_model(config: ConfigDict, tokenizer: Tokenizer, entities: int) -> None:
    """Refuses a model that does not fit its tokenizer, caches, start, or number of entities."""
    model, name = config.model, f"the tokenizer {config.data.tokenizer!r}"
    size, pad = tokenizer.vocab_size, tokenizer.pad_id
    if model.neck_init not in ("", "standardize"):
        raise UserError(f"config.model.neck_init is {model.neck_init!r}; give 'standardize' or ''")
    if size > model.text.vocab_size:
        most = model.text.vocab_size
        raise UserError(f"{name} has {size} tokens, config.model.text.vocab_size is {most}")
    if pad != model.pad_id:
        raise UserError(f"{name} pads with token {pad}, config.model.pad_id is {model.pad_id}")
    if config.data.cache_texts and model.projector_norm == "batch":
        raise UserError(
            "config.data.cache_texts keeps sentence vectors alone, but a batch norm "
            "(config.model.projector_norm = 'batch') also sees all tokens in training: set "
            "config.data.cache_texts = False"
        )
    masking = Masking(config.loss.masking)
    if config.loss.entity_weight > 0 and masking.classifies:
        where = f"config.loss.masking = {masking.value!r}"
        source = "decoder" if masking is Masking.MLM_GROUPS else "text"
        if (model.token_classes, model.token_classes_from) != (entities, source):
            raise UserError(
                f"{where} classifies {entities} entities: set config.model.token_classes = "
                f"{entities} and config.model.token_classes_from = {source!r}"
            )
        if tokenizer.mask_id < 0:
            raise UserError(f"{where} needs a tokenizer with a mask token")


def check_loop(config: ConfigDict) -> None:
    """Refuses numbers of steps and seconds, and evaluations, that the loop cannot follow."""
    for name, value in LEAST.items():
        if config[name] < value:
            raise UserError(f"config.{name} is {config[name]}; it must be at least {value}")
    if config.eval.every < 0:
        raise UserError(f"config.eval.every is {config.eval.every}; it must be at least 0")
    if config.eval.weights not in ("online", "teacher"):
        given = config.eval.weights
        raise UserError(f"config.eval.weights is {given!r}; it must be online or teacher")
    Protocol.from_config(config.eval.protocol)
