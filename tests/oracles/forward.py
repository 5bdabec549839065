"""The forward pass written from the definition, token by token and head by head, sharing no code with the package."""

import math

import torch


def rms(x):
    return x / torch.sqrt((x * x).mean() + 1e-6)


def rotate(x, position, theta):
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / len(x))  # tables are fp32
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[:half], x[half:]
    return torch.cat((first * cos + second * sin, -first * sin + second * cos))


@torch.no_grad()
def trunk_states(model, ids: list[int]) -> list[list[torch.Tensor]]:
    """Residual stream ``[D]`` after every layer and token: ``states[layer][t]``."""
    c, w = model.config, {name: p.detach() for name, p in model.named_parameters()}
    embedded = [rms(w["transformer.wte.weight"][i]) for i in ids]
    x0 = []
    for t, e in enumerate(embedded):
        gate = w["smear_lambda"] * torch.sigmoid(w["smear_gate.weight"][0] @ e[:24])
        x0.append(e + gate * embedded[t - 1] if t else e)
    x, layers = list(x0), []
    group = c.num_attention_heads // c.num_key_value_heads
    for i in range(c.num_hidden_layers):
        name = f"transformer.h.{i}."
        x = [w["resid_lambdas"][i] * a + w["x0_lambdas"][i] * b for a, b in zip(x, x0, strict=True)]
        queries, keys, values = [], [], []
        for t, token in enumerate(ids):
            n = rms(x[t])
            q, k, v = (w[f"{name}attn.{m}.weight"] @ n for m in ("c_q", "c_k", "c_v"))
            q, k, v = (y.view(-1, c.head_dim) for y in (q, k, v))
            if i % 2 == (c.num_hidden_layers - 1) % 2:
                gate = 3 * torch.sigmoid(w[f"{name}attn.ve_gate.weight"] @ n[:12])
                v = v + gate[:, None] * w[f"value_embeds.{i}.weight"][token].view_as(v)
            queries.append([rms(rotate(h, t, c.rope_theta)) * 1.2 for h in q])
            keys.append([rms(rotate(h, t, c.rope_theta)) * 1.2 for h in k])
            values.append(v)
        short = "SSSL"[i % 4] == "S" and i != c.num_hidden_layers - 1
        attended = []
        for t in range(len(ids)):
            first = max(0, t - c.short_window) if short else 0
            heads = []
            for h in range(c.num_attention_heads):
                scores = [queries[t][h] @ keys[s][h // group] / math.sqrt(c.head_dim) for s in range(first, t + 1)]
                weights = torch.stack(scores).softmax(dim=0)
                heads.append(sum(p * values[first + s][h // group] for s, p in enumerate(weights)))
            attended.append(w[f"{name}attn.c_proj.weight"] @ torch.cat(heads))
        x = [a + b for a, b in zip(x, attended, strict=True)]
        x = [a + w[f"{name}mlp.c_proj.weight"] @ torch.relu(w[f"{name}mlp.c_fc.weight"] @ rms(a)) ** 2 for a in x]
        layers.append(x)
    return layers


def capped(z):
    return 15 * torch.tanh(z / 15)


@torch.no_grad()
def stage_logits(model, ids: list[int]) -> list[torch.Tensor]:
    """Capped logits ``[T, V]`` of every stage."""
    layers, last, out = trunk_states(model, ids), -1, []
    for stage, count in enumerate(model.config.poe_stage_layers):
        last += count
        weight = model.lm_head.weight + model.lm_head_stages[stage].weight
        out.append(torch.stack([capped(weight @ rms(x)) for x in layers[last]]))
    return out


@torch.no_grad()
def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """Capped logits ``[T, V]`` of the plain path: backout of the state after layer L//2, shared head."""
    layers = trunk_states(model, ids)
    middle = layers[model.config.num_hidden_layers // 2]
    states = [rms(x - model.backout_lambda * y) for x, y in zip(layers[-1], middle, strict=True)]
    return torch.stack([capped(model.lm_head.weight @ n) for n in states])
