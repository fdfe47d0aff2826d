"""Multi-head Latent Attention from its formula alone, in float64: no cache, no padding, one sequence at a time.

With c(t) the normed latent, k_rope(t) the rotary key after RoPE, and W_UK and W_UV the two halves of `kv_b_proj`, head h computes

    score_h(s, t) = (q_nope_h(s) . W_UK_h c(t) + q_rope_h(s) . k_rope(t)) / sqrt(N + P),  out_h(s) = W_UV_h sum_t p_h(s, t) c(t)

where p_h is the softmax over the tokens t that s may see. Where QK-norm is exact, the score is divided by the root mean squares of
q_nope_h(s) and of the original key of t in the group of h. Of the code under test, only weights and sizes are read.
"""

import torch


def rms(x, eps):
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def angles(positions, width, theta):
    """[..., P / 2]: pair i of the rotary dimensions turns by position * theta^(-2i / P)."""
    return positions[..., None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotate(x, theta):
    """RoPE on [T, heads, P]; dimensions i and i + P / 2 are the real and the imaginary part of pair i."""
    turn = angles(torch.arange(len(x)), x.shape[-1], theta)[:, None]
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attention(x, weights, config, window):
    """[T, hidden_size] -> [T, hidden_size]."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    tokens, heads, groups, rank = len(x), config.num_attention_heads, config.num_key_norms, config.kv_lora_rank
    nope, theta = config.qk_nope_head_dim, config.rope_parameters["rope_theta"]
    query = linear("q_proj", x).view(tokens, heads, -1)
    q_nope, q_rope = query[..., :nope], rotate(query[..., nope:], theta)
    compressed = linear("kv_a_proj_with_mqa", x)
    latent = compressed[:, :rank] / rms(compressed[:, :rank], config.kv_a_layernorm_eps) * weights["kv_a_layernorm.weight"]
    k_rope = rotate(compressed[:, None, rank:], theta)[:, 0]
    kv_b = weights["kv_b_proj.weight"].view(heads, -1, rank)
    weight_uk, weight_uv = kv_b[:, :nope], kv_b[:, nope:]

    scores = torch.einsum("shn,hnr,tr->hst", q_nope, weight_uk, latent) + torch.einsum("shp,tp->hst", q_rope, k_rope)
    scores = scores / query.shape[-1] ** 0.5
    if groups:
        key = linear("k_proj", x).view(tokens, groups, nope).repeat_interleave(heads // groups, dim=1)
        norms = torch.einsum("shi,thi->hst", rms(q_nope, config.rms_norm_eps), rms(key, config.rms_norm_eps))
        scores = scores / norms
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (window or tokens))
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return linear("o_proj", torch.einsum("hst,tr,hvr->shv", probabilities, latent, weight_uv).flatten(1))


def logits(model, ids):
    """What a model (Llama, Mistral, Qwen2 or Qwen3 with MLA) says to one sequence: [T] -> [T, vocab_size]."""
    config, weights = model.config, model.state_dict()
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers

    def norm(name, x):
        return x / rms(x, config.rms_norm_eps) * weights[f"{name}.weight"]

    x = weights["model.embed_tokens.weight"][ids]  # [T, hidden_size]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        inside = {name.removeprefix(f"{layer}.self_attn."): weight for name, weight in weights.items()}
        window = getattr(config, "sliding_window", None) if types[i] == "sliding_attention" else None
        x = x + attention(norm(f"{layer}.input_layernorm", x), inside, config, window)
        gate, up, down = (weights[f"{layer}.mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        y = norm(f"{layer}.post_attention_layernorm", x)
        x = x + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
    return norm("model.norm", x) @ weights["lm_head.weight"].T
