"""The released model's forward pass in evaluation, from converted weights.

Recorded values are compared by |ours - theirs| / |theirs| (Euclidean norms over the array) with
the limit 1e-5; the group that each patch is assigned to must be the same everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.losses.contrastive import info_nce, negatives_mask
from ovseg_jax.models.ovsegmentor import unit
from ovseg_jax.models.vit import resize_grid
from released.arrays import ReleasedSet, relative, sets_with

LIMIT = 1e-5


def image_values(case, params):
    """Values of the visual encoder: of its parts, by what they gave within one pass."""
    variables = {"params": params, "batch_stats": case.statistics}
    record = {"method": "visual_tokens", "capture_intermediates": True, "mutable": True}
    tokens, seen = case.model.apply(variables, case.image("image"), **record)
    seen = seen["intermediates"]["image_encoder"]
    encoder, values = params["image_encoder"], {}

    def at(*path):
        node = seen
        for name in path:
            node = node[name]
        return node["__call__"][0]

    embedded = at("embed_norm") if case.config["image"]["patch_norm"] else at("patch_embed")
    values["img/patch_tokens"] = embedded
    values["img/patch_tokens_plus_pos"] = embedded + encoder["position"][None]
    count, whole = embedded.shape[1], at("first")
    values["img/stage0_patch_tokens_out"] = whole[:, :count]
    values["img/stage0_group_tokens_out"] = whole[:, count:]
    parts = {
        "norm_tokens_out": ("token_norm",),
        "norm_x_out": ("patch_norm",),
        "projected_group_tokens": ("mixed_norm",),
        "pre_assign_cross_attn_out": ("cross", "attention"),
        "pre_assign_out": ("cross",),
        "assign_out_before_residual": ("out",),
        "mlp_channels_out": ("mlp",),
    }
    values |= {f"grouping/{name}": at("binding", *path) for name, path in parts.items()}
    values["grouping/mlp_inter_out_BxCxK"] = at("binding", "mixing").transpose(0, 2, 1)
    values["grouping/out"] = at("binding").groups
    query, key = tokens.query, tokens.key
    values["grouping/q"], values["grouping/k"] = query[:, None], key[:, None]
    logits = jnp.einsum("bkd,bld->bkl", query, key) * query.shape[-1] ** -0.5
    values["grouping/raw_logits"] = logits[:, None]
    values["grouping/soft"] = tokens.affinity.transpose(0, 2, 1)[:, None]
    values["grouping/hard"] = tokens.assigned.transpose(0, 2, 1)[:, None]
    values["img/final_norm_out"] = tokens.groups
    return values


def rest_values(case, params):
    """Every recorded value behind the visual encoder: joint space, BERT, decoder, losses."""
    variables = {"params": params, "batch_stats": case.statistics}

    def call(method, *args):
        return case.model.apply(variables, *args, method=method)

    values = {}
    groups = call("visual_tokens", case.image("image")).groups
    mean = jnp.mean(groups, axis=1)
    image_x = call("embed_image", mean)
    values["out/image_x_before_proj"], values["out/image_x"] = mean, image_x
    values["out/image_feat_before_proj"] = groups
    values["out/image_feat"] = call("embed_image", groups)
    text = call("text_tokens", case.ids("text"))
    values["out/text_feat_before_proj"] = text.tokens
    values["out/text_x_before_proj"] = text.pooled
    text_x = call("embed_text", text.pooled)
    values["out/text_x"] = text_x
    values["out/text_feat_after_proj"] = call("embed_text", text.tokens)
    question = call("text_tokens", case.ids("question"))

    def decode(model, *args):
        out = model.entity_decoder(*args)
        return out, model.completion_projector(out[:, 0], False)

    completed, bridge = call(decode, question.tokens, question.mask, groups)
    values["entity/tokens_out"] = completed
    values["entity/answer_token"], values["entity/bridge_out"] = completed[:, 0], bridge
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


def errors_of(ours, recorded):
    """Relative error of each of our values that is recorded, as most are."""
    shared = {name: relative(x, recorded[name]) for name, x in ours.items() if name in recorded}
    assert len(shared) > 0.4 * len(ours)
    return shared


@pytest.fixture(scope="module", params=sets_with("eval_image.npz", "eval_rest.npz"))
def case(request):
    return ReleasedSet(*request.param)


def test_visual_encoder(case):
    recorded = case.file("eval_image")
    ours = jax.jit(lambda params: image_values(case, params))(case.params)
    errors = errors_of(ours, recorded) | position_errors(case, recorded)
    case.check("eval", errors, LIMIT)
    groups, theirs = (np.argmax(x["grouping/hard"][:, 0], axis=1) for x in (ours, recorded))
    np.testing.assert_array_equal(groups, theirs)


def test_joint_space_text_decoder_and_losses(case):
    recorded = case.file("eval_rest")
    ours = jax.jit(lambda params: rest_values(case, params))(case.params)
    case.check("eval", errors_of(ours, recorded), LIMIT)
