"""Transformer layers (Sec. 3.1.1), BERT's layer, Eq. 8's decoder layer and the binding, Eq. 3-6.

Parameters are nested dicts as the modules name them; every function takes one example [T, D].
"""

import math

import numpy as np


def dense(p, x):
    y = x @ np.asarray(p["kernel"], np.float64)
    return y + p["bias"] if "bias" in p else y


def layer_norm(p, x, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(p, queries, context, heads, keep=None):
    """Multi-head attention, head by head; only the context's tokens with `keep` exist at all."""
    if keep is not None:
        context = context[keep]
    query, key, value = (
        dense(p["query"], queries),
        dense(p["key"], context),
        dense(p["value"], context),
    )
    width = query.shape[-1] // heads
    mixed = np.zeros_like(query)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = softmax(query[:, part] @ key[:, part].T / math.sqrt(width))
        mixed[:, part] = weights @ value[:, part]
    return dense(p["out"], mixed)


def feed_forward(p, x):
    return dense(p["fc2"], gelu(dense(p["fc1"], x)))


def pre_norm_layer(p, x, heads, eps):
    """x + MHSA(LN(x)), then x + FFN(LN(x)); layer scale where the parameters have it."""

    def scaled(name, branch):
        return branch * p[name]["scale"] if name in p else branch

    normed = layer_norm(p["attention_norm"], x, eps)
    x = x + scaled("attention_scale", attention(p["attention"], normed, normed, heads))
    return x + scaled("mlp_scale", feed_forward(p["mlp"], layer_norm(p["mlp_norm"], x, eps)))


def post_norm_layer(p, x, heads, eps, keep):
    """BERT: LN(x + MHSA(x)), then LN(x + FFN(x))."""
    x = layer_norm(p["attention_norm"], x + attention(p["attention"], x, x, heads, keep), eps)
    return layer_norm(p["mlp_norm"], x + feed_forward(p["mlp"], x), eps)


def layer_of(stacked, index):
    """Parameters of one layer of a stack."""
    return {
        name: layer_of(value, index) if isinstance(value, dict) else value[index]
        for name, value in stacked.items()
    }


def bert(p, ids, keep, depth, heads, eps):
    """Word, position and type-0 embeddings, LayerNorm, layers."""
    x = np.stack(
        [p["word"][token] + p["position"][i] + p["token_type"][0] for i, token in enumerate(ids)]
    ).astype(np.float64)
    x = layer_norm(p["embed_norm"], x, eps)
    for index in range(depth):
        x = post_norm_layer(layer_of(p["layers"], index), x, heads, eps, keep)
    return x


def decoder(p, tokens, keep, groups, heads, eps):
    """Eq. 8: projected caption tokens attend to themselves and then to the groups."""
    x, layer = dense(p["project"], tokens), p["layer_0"]
    normed = layer_norm(layer["self_norm"], x, eps)
    x = x + attention(layer["self_attention"], normed, normed, heads, keep)
    normed = layer_norm(layer["cross_norm"], x, eps)
    x = x + attention(layer["cross_attention"], normed, groups, heads)
    x = x + feed_forward(layer["mlp"], layer_norm(layer["mlp_norm"], x, eps))
    return layer_norm(p["norm"], x, eps)


def binding(p, groups, patches, eps, scale, hard):
    """Eq. 3-6. An empty group receives a zero update."""
    groups_in = layer_norm(p["group_norm"], groups, eps)
    patches_in = layer_norm(p["patch_norm"], patches, eps)
    query = dense(p["query"], groups_in)  # Eq. 3
    key, value = dense(p["key"], patches_in), dense(p["value"], patches_in)
    affinity = softmax(scale * key @ query.T, axis=1)  # Eq. 4, over the groups
    assigned = affinity
    if hard:
        assigned = np.zeros_like(affinity)
        assigned[np.arange(len(patches)), affinity.argmax(1)] = 1
    update = np.zeros((len(groups), value.shape[-1]))
    for k in range(len(groups)):  # Eq. 5
        if assigned[:, k].sum() > 0:
            update[k] = (assigned[:, k : k + 1] * value).sum(0) / assigned[:, k].sum()
    return groups + dense(p["out"], update), affinity  # Eq. 6


def pool(tokens, keep, how):
    if how == "cls":
        return tokens[0]
    if how == "eot":
        return tokens[np.flatnonzero(keep)[-1]]
    return tokens[keep].mean(0)


# ---- patches and positions


def patches(image, size):
    """[H, W, 3] to [L, size * size * 3]: patches row by row, pixels of a patch row by row."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    out = []
    for i in range(rows):
        for j in range(columns):
            pixels = []
            for y in range(size):
                for x in range(size):
                    pixels.extend(image[i * size + y, j * size + x])
            out.append(pixels)
    return np.array(out)


def keys_kernel(t, a=-0.75):
    """Keys (1981), the piecewise cubic with support 2."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def bicubic(grid, target):
    """[h, w, D] to [target rows, target columns, D]: half-pixel centers, borders repeated."""
    h, w = grid.shape[:2]
    out = np.zeros((*target, grid.shape[-1]))
    for i in range(target[0]):
        for j in range(target[1]):
            y, x = (i + 0.5) * h / target[0] - 0.5, (j + 0.5) * w / target[1] - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    near = grid[min(max(m, 0), h - 1), min(max(n, 0), w - 1)]
                    out[i, j] += keys_kernel(y - m) * keys_kernel(x - n) * near
    return out
