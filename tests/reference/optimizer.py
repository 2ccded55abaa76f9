"""AdamW as its authors print it, and the learning-rate schedule."""

import math

import numpy as np


def rate_at(step, peak, warmup, total, end):
    """The first step of a warm-up already moves; a half cosine from its end to `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min((step - warmup) / (total - warmup), 1)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


def clipped(grads, limit):
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    return {name: g * min(1, limit / norm) for name, g in grads.items()}


class AdamW:
    """Loshchilov and Hutter (2019), Algorithm 2, with the decay times the rate."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps, self.count = b1, b2, eps, 0
        self.m, self.v = {}, {}

    def step(self, params, grads, rates, decays):
        """New parameters; `rates` and `decays` are per parameter."""
        self.count += 1
        new = {}
        for name, g in grads.items():
            self.m[name] = self.b1 * self.m.get(name, 0) + (1 - self.b1) * g
            self.v[name] = self.b2 * self.v.get(name, 0) + (1 - self.b2) * g**2
            m_hat = self.m[name] / (1 - self.b1**self.count)
            v_hat = self.v[name] / (1 - self.b2**self.count)
            step = m_hat / (np.sqrt(v_hat) + self.eps) + decays[name] * params[name]
            new[name] = params[name] - rates[name] * step
        return new
