"""Video-XL window by window in NumPy float64, as the published code goes about it.

Kept apart from the library on purpose: it shares neither code nor method with it. Memory keys are
stored before RoPE and rotated again at every use, windows and layers run one after another in
Python loops, and parameters are read under their published names.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, positions, theta):
    """x [T, heads, H] rotated in halves at `positions` [T]."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Oracle:
    """One sample's run; call `text` and `visual` in stream order, then read `logits`."""

    def __init__(self, config, weights):
        self.c = config.language
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.keys = [np.zeros((0, self.c.kv_heads, self.c.head_size))] * self.c.layers
        self.values = list(self.keys)
        self.hidden = []  # of every token that is not a beacon, in order

    def text(self, ids):
        x = self.w["model.embed_tokens.weight"][ids]
        self._window(x, np.zeros(len(ids), bool), np.ones(len(ids), bool))

    def visual(self, features, window, ratios):
        """features [V, D]; ratios: one for each window, None for no compression."""
        for i, ratio in zip(range(0, len(features), window), ratios, strict=True):
            rows, beacon = [], []
            for j, feature in enumerate(features[i : i + window], start=1):
                rows.append(feature)
                beacon.append(False)
                if ratio and j % ratio == 0:
                    rows.append(self.w["model.beacon_embed_tokens.weight"][0])
                    beacon.append(True)
            keep = np.array(beacon) if ratio else np.ones(len(rows), bool)
            self._window(np.array(rows, np.float64), np.array(beacon), keep)

    def _window(self, x, beacon, keep):
        c, count, past = self.c, len(x), len(self.keys[0])
        own = past + np.arange(count)
        mask = np.concatenate([np.ones((count, past), bool), np.tri(count, dtype=bool)], 1)
        for layer in range(c.layers):
            w = {
                name.removeprefix(f"model.layers.{layer}."): value
                for name, value in self.w.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            y = rms_norm(x, w["input_layernorm.weight"], c.norm_eps)

            def heads(name, y=y, w=w):
                plain = y @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]
                special = (
                    y @ w[f"self_attn.beacon_{name}_proj.weight"].T
                    + w[f"self_attn.beacon_{name}_proj.bias"]
                )
                return np.where(beacon[:, None], special, plain).reshape(count, -1, c.head_size)

            q, k, v = heads("q"), heads("k"), heads("v")
            keys = np.concatenate([self.keys[layer], k])
            values = np.concatenate([self.values[layer], v])
            group = c.heads // c.kv_heads
            rotated = np.repeat(rope(keys, np.arange(past + count), c.rope_theta), group, 1)
            scores = np.einsum("qnh,knh->nqk", rope(q, own, c.rope_theta), rotated)
            p = softmax(np.where(mask, scores / np.sqrt(c.head_size), -np.inf))
            out = np.einsum("nqk,knh->qnh", p, np.repeat(values, group, 1)).reshape(count, -1)
            x = x + out @ w["self_attn.o_proj.weight"].T
            y = rms_norm(x, w["post_attention_layernorm.weight"], c.norm_eps)
            gate = y @ w["mlp.gate_proj.weight"].T
            up = y @ w["mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
            self.keys[layer] = np.concatenate([self.keys[layer], k[keep]])
            self.values[layer] = np.concatenate([self.values[layer], v[keep]])
        self.hidden.append(x[~beacon])

    def logits(self):
        """[tokens that are not beacons, vocabulary]."""
        x = rms_norm(np.concatenate(self.hidden), self.w["model.norm.weight"], self.c.norm_eps)
        return x @ self.w["lm_head.weight"].T
