"""Our forward pass in evaluation, under the names of the released code's recorded values."""

import jax
import jax.numpy as jnp

from ovseg_jax.losses.contrastive import info_nce, negatives_mask
from ovseg_jax.models.ovsegmentor import unit
from ovseg_jax.models.transformer import PostNormLayer, PreNormLayer
from ovseg_jax.models.vit import resize_grid
from released.arrays import relative


def layer_of(stack, index):
    """One layer's parameters of a stack."""
    return jax.tree.map(lambda x: x[index], stack["layers"])


def image_values(case, params):
    """Every recorded value of the visual encoder.

    Each layer is run on its own, on what the one before gave; `stage*_tokens_out` and what follows
    come from the model's own pass.
    """
    image, model = case.image("image"), case.model
    variables = {"params": params, "batch_stats": case.statistics}
    tokens, seen = model.apply(
        variables, image, method="visual_tokens", capture_intermediates=True, mutable=True
    )
    seen = seen["intermediates"]["image_encoder"]
    encoder, config = params["image_encoder"], case.config["image"]

    def at(*path):
        node = seen
        for name in path:
            node = node[name]
        return node["__call__"][0]

    values = {}
    embedded = at("embed_norm") if config["patch_norm"] else at("patch_embed")
    count = embedded.shape[1]
    values["img/patch_tokens"] = embedded
    values["img/patch_tokens_plus_pos"] = embedded + encoder["position"][None]
    learned = encoder["group_token"]
    learned = jnp.broadcast_to(learned[None], (len(embedded), *learned.shape))
    x = jnp.concatenate([values["img/patch_tokens_plus_pos"], learned], axis=1)
    for stage, stack in enumerate(("first", "second")):
        heads = config["heads"] if stage == 0 else config["second_heads"]
        layer = PreNormLayer(heads, config["mlp_ratio"], config["eps"])
        x = x if stage == 0 else tokens_of(seen)
        for index in range(config[f"{stack}_layers"]):
            mine, record = {"params": layer_of(encoder[stack], index)}, {"mutable": True}
            record["capture_intermediates"] = True
            (x, _), parts = layer.apply(mine, x, jnp.zeros(()), **record)
            parts, name = parts["intermediates"], f"img/stage{stage}_block{index}"
            values[f"{name}_attn_out"] = parts["attention"]["__call__"][0]
            values[f"{name}_mlp_out"] = parts["mlp"]["__call__"][0]
            values[f"{name}_out"] = x
    whole = at("first")
    values["img/stage0_patch_tokens_out"] = whole[:, :count]
    values["img/stage0_group_tokens_out"] = whole[:, count:]
    block = seen["binding"]
    recorded = {
        "norm_tokens_out": block["token_norm"],
        "norm_x_out": block["patch_norm"],
        "projected_group_tokens": block["mixed_norm"],
        "pre_assign_cross_attn_out": block["cross"]["attention"],
        "pre_assign_out": block["cross"],
        "assign_out_before_residual": block["out"],
        "mlp_channels_out": block["mlp"],
    }
    values |= {f"grouping/{name}": node["__call__"][0] for name, node in recorded.items()}
    values["grouping/mlp_inter_out_BxCxK"] = at("binding", "mixing").transpose(0, 2, 1)
    values["grouping/new_x_after_residual"] = at("binding", "cross") + at("binding", "out")
    values["grouping/out"] = tokens_of(seen)
    query, key = tokens.query, tokens.key
    values["grouping/q"], values["grouping/k"] = query[:, None], key[:, None]
    logits = jnp.einsum("bkd,bld->bkl", query, key) * query.shape[-1] ** -0.5
    values["grouping/raw_logits"] = logits[:, None]
    values["grouping/soft"] = tokens.affinity.transpose(0, 2, 1)[:, None]
    values["grouping/hard"] = tokens.assigned.transpose(0, 2, 1)[:, None]
    values["img/final_norm_out"] = tokens.groups
    return values


def tokens_of(seen):
    """The groups that binding gave."""
    return seen["binding"]["__call__"][0].groups


def rest_values(case, params):
    """Every recorded value behind the visual encoder: joint space, BERT, decoder, losses."""
    variables = {"params": params, "batch_stats": case.statistics}
    model, config = case.model, case.config

    def call(method, *args, **options):
        return model.apply(variables, *args, method=method, **options)

    values = {}
    groups = call("visual_tokens", case.image("image")).groups
    mean = jnp.mean(groups, axis=1)
    image_x = call("embed_image", mean)
    values["out/image_x_before_proj"], values["out/image_x"] = mean, image_x
    values["out/image_feat_before_proj"] = groups
    values["out/image_feat"] = call("embed_image", groups)
    ids = case.ids("text")
    text, seen = call("text_tokens", ids, capture_intermediates=True, mutable=True)
    x = seen["intermediates"]["text_encoder"]["embed_norm"]["__call__"][0]
    values["text/hidden0"] = x
    options = config["text"]
    layer = PostNormLayer(options["heads"], options["mlp_width"], options["eps"], 0.0, False)
    for index in range(options["depth"]):
        mine = layer_of(params["text_encoder"], index)
        x = layer.apply({"params": mine}, x, text.mask)[0]
        values[f"text/hidden{index + 1}"] = x
    values["out/text_feat_before_proj"] = text.tokens
    values["out/text_x_before_proj"] = text.pooled
    text_x = call("embed_text", text.pooled)
    values["out/text_x"] = text_x
    values["out/text_feat_after_proj"] = call("embed_text", text.tokens)
    question = call("text_tokens", case.ids("question"))

    def decode(model, *args):
        out = model.entity_decoder(*args)
        return out, model.completion_projector(out[:, 0], False)

    masked = question.tokens, question.mask, groups
    record = {"capture_intermediates": True, "mutable": True}
    (completed, bridge), seen = model.apply(variables, *masked, method=decode, **record)
    seen = seen["intermediates"]["entity_decoder"]
    aligned = {"visual": ("align_image", groups), "question": ("align_text", question.tokens)}
    for side, (name, raw) in aligned.items():
        values[f"entity/{side}_aligned"] = seen[name]["__call__"][0] if name in seen else raw
    values["entity/block0_pre_assign_out"] = seen["layer_0"]["cross"]["__call__"][0]
    values["entity/tokens_out"] = completed
    values["entity/answer_token"] = completed[:, 0]
    values["entity/bridge_out"] = bridge
    answer = call("embed_text", call("text_tokens", case.ids("answer")).pooled)
    values["entity/answer_text_x"] = answer
    scale = call("logit_scale")
    values["out/logit_scale"], values["out/logit_scale_exp_clamped"] = params["log_scale"], scale
    values["entity/contrastive_loss"] = contrastive(bridge, answer, scale)
    values["out/matching_loss"] = contrastive(image_x, text_x, scale)
    prompts = call("embed_text", call("text_tokens", case.ids("class_text")).pooled)
    classes = case.meta["config"]["n_cls"]
    classes = unit(jnp.mean(prompts.reshape(classes, -1, prompts.shape[-1]), axis=1))
    values["zs/text_embedding"] = classes
    values["zs/class_logits"] = unit(image_x) @ classes.T
    return values


def contrastive(a, b, scale):
    """The mean of `info_nce`."""
    return jnp.mean(info_nce(unit(a), unit(b), scale, negatives_mask(jnp.ones(len(a))))[0])


def position_errors(case, recorded):
    """Relative error of resized position embeddings, by recorded name."""
    errors = {}
    for name, theirs in recorded.items():
        if name.startswith("pos_embed/"):
            rows, columns = (int(part) for part in name.split("/")[1].split("x"))
            table = jnp.asarray(case.params["image_encoder"]["position"])
            ours = resize_grid(table, case.config["image"]["grid"], (rows, columns))
            errors[name] = relative(ours[None], theirs)
    return errors


def errors_of(ours, recorded, skipped=()):
    """Relative error of each recorded value; one that we do not compute is a KeyError."""
    return {
        name: relative(ours[name], theirs)
        for name, theirs in recorded.items()
        if not name.startswith(("pos_embed/", *skipped))
    }
