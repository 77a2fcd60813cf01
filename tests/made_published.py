"""Miniature files in the published formats, and the model's formulas in plain PyTorch on their raw tensors."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

HEAD = 4  # of encoder and Q-Former
ENC = {"width": 8, "layers": 2, "mlp": 12, "group": 6, "channels": 6, "groups": 8, "size": 4}
QF = {"width": 16, "layers": 4, "ffn": 20, "keys": 24, "queries": 3}
LLM = {"width": 40, "layers": 3, "heads": 2, "dim": 20, "ffn": 48, "vocab": 64, "mid": 28}
RANK, QRANK = 2, 2
EXPERTS = 4


def rand(*shape, scale=0.1):
    return torch.randn(*shape) * scale


def near_one(*shape):
    return 1 + 0.1 * torch.randn(*shape)


def linear(out, into, bias=True, name=""):
    made = {f"{name}.weight": rand(out, into, scale=into**-0.5)}
    return made | ({f"{name}.bias": rand(out)} if bias else {})


def norm(width, name):
    return {f"{name}.weight": near_one(width), f"{name}.bias": rand(width)}


def encoder(dims=ENC["group"]):
    """Args: dims: width of the mini-PointNet's output, `encoder_dims` of the published code."""
    w, g, c = ENC["width"], ENC["group"], ENC["channels"]
    made = {"cls_token": rand(1, 1, w), "cls_pos": rand(1, 1, w)}
    for name, into, mid, out in (("first_conv", c, g // 2, g), ("second_conv", 2 * g, 2 * g, dims)):
        prefix = f"encoder.{name}"
        made |= {f"{prefix}.0.weight": rand(mid, into, 1, scale=0.4), f"{prefix}.0.bias": rand(mid)}
        made |= norm(mid, f"{prefix}.1")
        made |= {f"{prefix}.1.running_mean": rand(mid), f"{prefix}.1.running_var": near_one(mid).abs()}
        made |= {f"{prefix}.1.num_batches_tracked": torch.tensor(7)}
        made |= {f"{prefix}.3.weight": rand(out, mid, 1, scale=0.4), f"{prefix}.3.bias": rand(out)}
    made |= linear(w, dims, name="reduce_dim") | linear(128, 3, name="pos_embed.0") | linear(w, 128, name="pos_embed.2")
    for i in range(ENC["layers"]):
        b = f"blocks.blocks.{i}"
        made |= norm(w, f"{b}.norm1") | norm(w, f"{b}.norm2") | linear(3 * w, w, False, f"{b}.attn.qkv")
        made |= linear(w, w, name=f"{b}.attn.proj")
        made |= linear(ENC["mlp"], w, name=f"{b}.mlp.fc1") | linear(w, ENC["mlp"], name=f"{b}.mlp.fc2")
    return made | norm(w, "norm")


def qformer():
    w, made = QF["width"], {}
    made |= norm(w, "Qformer.bert.embeddings.LayerNorm")
    for i in range(QF["layers"]):
        b = f"Qformer.bert.encoder.layer.{i}"
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            keys = QF["keys"] if kind == "crossattention" else w
            made |= linear(w, w, name=f"{b}.{kind}.self.query")
            made |= linear(w, keys, name=f"{b}.{kind}.self.key") | linear(w, keys, name=f"{b}.{kind}.self.value")
            made |= linear(w, w, name=f"{b}.{kind}.output.dense") | norm(w, f"{b}.{kind}.output.LayerNorm")
        made |= linear(QF["ffn"], w, name=f"{b}.intermediate_query.dense")
        made |= linear(w, QF["ffn"], name=f"{b}.output_query.dense") | norm(w, f"{b}.output_query.LayerNorm")
    return made


def blip2():
    made = qformer() | {"query_tokens": rand(1, QF["queries"], QF["width"], scale=1)}
    made |= {"Qformer.bert.embeddings.position_ids": torch.arange(5)[None]}
    made |= norm(9, "ln_vision") | linear(5, 16, name="t5_proj")
    return made | {"Qformer.bert.encoder.layer.0.intermediate.dense.weight": rand(3, 3)}


def phi(fused):
    w, made = LLM["width"], {"model.embed_tokens.weight": rand(LLM["vocab"], LLM["width"], scale=1)}
    for i in range(LLM["layers"]):
        b = f"model.layers.{i}"
        made |= norm(w, f"{b}.input_layernorm") | linear(w, w, name=f"{b}.self_attn.dense")
        made |= linear(LLM["ffn"], w, name=f"{b}.mlp.fc1") | linear(w, LLM["ffn"], name=f"{b}.mlp.fc2")
        qkv = [linear(w, w, name=f"{b}.self_attn.{name}_proj") for name in "qkv"]
        if not fused:
            made |= qkv[0] | qkv[1] | qkv[2]
            continue
        for kind in ("weight", "bias"):
            parts = [one[f"{b}.self_attn.{name}_proj.{kind}"] for one, name in zip(qkv, "qkv", strict=True)]
            rows = [part[h * LLM["dim"] + d] for h in range(LLM["heads"]) for part in parts for d in range(LLM["dim"])]
            made[f"{b}.self_attn.query_key_value.{kind}"] = torch.stack(rows)
        made[f"{b}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return made | norm(w, "model.final_layernorm") | linear(LLM["vocab"], w, name="lm_head")


def stage():
    """A stage 2 or 3 file, aliases of the encoder included."""
    w, q, p = LLM["width"], QF["width"], "llama_model.base_model.model.model"
    made = {"query_tokens": rand(1, QF["queries"], q, scale=1)}
    made |= linear(q, ENC["width"], name="point_2_Qformer_proj.0") | linear(
        QF["keys"], q, name="point_2_Qformer_proj.2"
    )
    made |= linear(LLM["mid"], q, name="llama_proj") | linear(w, LLM["mid"], name="llama_proj2")
    for i in range(QF["layers"]):
        b = f"Qformer.bert.encoder.layer.{i}"
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            for name in ("query", "key", "value"):
                into = QF["keys"] if kind == "crossattention" and name != "query" else q
                made[f"{b}.{kind}.self.{name}.lora_A.default.weight"] = rand(QRANK, into, scale=0.3)
                made[f"{b}.{kind}.self.{name}.lora_B.default.weight"] = rand(q, QRANK, scale=0.3)
            made[f"{b}.{kind}.output.LayerNorm.weight"] = near_one(q)
        made[f"{b}.output_query.LayerNorm.weight"] = near_one(q)
    for i in range(LLM["layers"]):
        for name, out in (("query_key_value", 3 * w), ("dense", w)):
            made[f"{p}.layers.{i}.self_attn.{name}.lora_A.default.weight"] = rand(RANK, w, scale=0.3)
            made[f"{p}.layers.{i}.self_attn.{name}.lora_B.default.weight"] = rand(out, RANK, scale=0.3)
        for name in ("q", "k"):
            made[f"{p}.layers.{i}.self_attn.{name}_layernorm.weight"] = near_one(LLM["dim"])
        made[f"{p}.layers.{i}.input_layernorm.weight"] = near_one(w)
        made[f"{p}.layers.{i}.post_layernorm.weight"] = near_one(w)
    made[f"{p}.final_layernorm.weight"] = near_one(w)
    return made | {"Qformer.bert.embeddings.position_ids": torch.arange(5)[None]}


def with_encoder_aliases(made, encoder_file):
    made |= {f"point_encoder.{name}": one for name, one in encoder_file.items()}
    return made | {f"pc_encoder.{name}": one for name, one in encoder_file.items() if ".1.running" in name}


def stage4():
    made = {f"query_expert_dict.{i}": rand(1, QF["queries"], QF["width"], scale=1) for i in range(EXPERTS)}
    made["query_tokens"] = made["query_expert_dict.0"]
    return made | linear(256, 2 * ENC["width"], name="query_router.0") | linear(EXPERTS, 256, name="query_router.2")


def projector():
    w, mid = LLM["width"], (LLM["width"] + QF["width"]) // 2
    made = linear(mid, w, name="alignment_projector.projector.0") | linear(
        mid, mid, name="alignment_projector.projector.2"
    )
    return made | linear(QF["width"], mid, name="alignment_projector.projector.4")


def save_llm(folder: Path, tensors, dtype=torch.float32, shards=2, **config):
    """Two safetensors shards and config.json, as the model's page has them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    for number in range(shards):
        part = {
            n: tensors[n].to(dtype) if tensors[n].is_floating_point() else tensors[n] for n in names[number::shards]
        }
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
    stored = {
        "model_type": "phi",
        "hidden_size": LLM["width"],
        "num_hidden_layers": LLM["layers"],
        "num_attention_heads": LLM["heads"],
        "intermediate_size": LLM["ffn"],
        "vocab_size": LLM["vocab"],
        "max_position_embeddings": 128,
        "partial_rotary_factor": 0.4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(stored | config))
    return folder


def save_container(path: Path, tensors, key="model", prefix="", half=False):
    state = {f"{prefix}{n}": one.half() if half and one.is_floating_point() else one for n, one in tensors.items()}
    extra = {"optimizer": {"state": {}, "param_groups": []}, "config": {"run": {"lr": 1e-5}}, "scaler": {}, "epoch": 1}
    torch.save({key: state} | (extra if key == "model" else {}), path)
    return path


# -- the formulas ------------------------------------------------------------------------------------------------------


def lin(t, name, x, lora=None, scale=0.0):
    y = F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))
    if lora is not None:
        y = y + scale * (x @ lora[f"{name}.lora_A.default.weight"].T @ lora[f"{name}.lora_B.default.weight"].T)
    return y


def ln(t, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def attend(q, k, v, heads, causal=False):
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(-2, -3) for one in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def encode(t, cloud):
    """`[N, 6] -> [1 + G, D]`"""
    xyz, chosen = cloud[:, :3].double(), [0]
    nearest = ((xyz - xyz[0]) ** 2).sum(-1)
    while len(chosen) < ENC["groups"]:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, ((xyz - xyz[chosen[-1]]) ** 2).sum(-1))
    centres = cloud[chosen, :3]
    near = torch.cdist(centres.double(), xyz).topk(ENC["size"], largest=False).indices
    x = cloud[near].clone()
    x[..., :3] -= centres[:, None]

    def conv(name, x):
        x = F.linear(x, t[f"{name}.0.weight"][..., 0], t[f"{name}.0.bias"])
        mean, var = t[f"{name}.1.running_mean"], t[f"{name}.1.running_var"]
        x = (x - mean) / (var + 1e-5).sqrt() * t[f"{name}.1.weight"] + t[f"{name}.1.bias"]
        return F.linear(x.relu(), t[f"{name}.3.weight"][..., 0], t[f"{name}.3.bias"])

    x = conv("encoder.first_conv", x)
    whole = x.amax(1, keepdim=True).expand_as(x)
    x = conv("encoder.second_conv", torch.cat([whole, x], -1)).amax(1)
    x = torch.cat([t["cls_token"][0], lin(t, "reduce_dim", x)])
    place = lin(t, "pos_embed.2", F.gelu(lin(t, "pos_embed.0", centres)))
    place = torch.cat([t["cls_pos"][0], place])
    for i in range(ENC["layers"]):
        b = f"blocks.blocks.{i}"
        x = x + place
        x = x + lin(
            t,
            f"{b}.attn.proj",
            attend(*lin(t, f"{b}.attn.qkv", ln(t, f"{b}.norm1", x)).chunk(3, -1), ENC["width"] // HEAD),
        )
        x = x + lin(t, f"{b}.mlp.fc2", F.gelu(lin(t, f"{b}.mlp.fc1", ln(t, f"{b}.norm2", x))))
    return ln(t, "norm", x)


def query(t, lora, queries, keys):
    """Q-Former, `[Q, D], [T, K] -> [Q, D]`; norms of `lora` replace those of `t`."""
    t = t | {n: one for n, one in lora.items() if "LayerNorm" in n}
    x = ln(t, "Qformer.bert.embeddings.LayerNorm", queries, 1e-12)
    for i in range(QF["layers"]):
        b = f"Qformer.bert.encoder.layer.{i}"
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            source = keys if kind == "crossattention" else x
            q, k, v = (
                lin(t, f"{b}.{kind}.self.{name}", x if name == "query" else source, lora or None, 2.0)
                for name in ("query", "key", "value")
            )
            mixed = lin(t, f"{b}.{kind}.output.dense", attend(q, k, v, QF["width"] // HEAD))
            x = ln(t, f"{b}.{kind}.output.LayerNorm", mixed + x, 1e-12)
        wide = F.gelu(lin(t, f"{b}.intermediate_query.dense", x))
        x = ln(t, f"{b}.output_query.LayerNorm", lin(t, f"{b}.output_query.dense", wide) + x, 1e-12)
    return x


def read(t, lora, embeds):
    """The language model of a split-format folder with the checkpoint's fused adapters, `[T, H] -> [T, vocabulary]`."""
    heads, dim, rotary = LLM["heads"], LLM["dim"], int(LLM["dim"] * 0.4)
    lora = {n.removeprefix("llama_model.base_model.model."): one for n, one in lora.items()}
    t = t | {n: one for n, one in lora.items() if "layernorm" in n}
    angle = torch.arange(len(embeds))[:, None] / 10000 ** (torch.arange(0, rotary, 2) / rotary)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def turn(x):  # [T, heads, dim]
        r = x[..., :rotary]
        half = torch.cat([-r[..., rotary // 2 :], r[..., : rotary // 2]], -1)
        return torch.cat([r * cos[:, None] + half * sin[:, None], x[..., rotary:]], -1)

    x = embeds
    for i in range(LLM["layers"]):
        b = f"model.layers.{i}"
        h = ln(t, f"{b}.input_layernorm", x)
        extra = h @ lora[f"{b}.self_attn.query_key_value.lora_A.default.weight"].T
        extra = SCALE * (extra @ lora[f"{b}.self_attn.query_key_value.lora_B.default.weight"].T)
        extra = extra.view(-1, heads, 3, dim)
        q, k, v = (
            lin(t, f"{b}.self_attn.{n}_proj", h).view(-1, heads, dim) + extra[:, :, j] for j, n in enumerate("qkv")
        )
        q = F.layer_norm(q, (dim,), t[f"{b}.self_attn.q_layernorm.weight"], eps=1e-5)
        k = F.layer_norm(k, (dim,), t[f"{b}.self_attn.k_layernorm.weight"], eps=1e-5)
        mixed = attend(turn(q).flatten(1), turn(k).flatten(1), v.flatten(1), heads, causal=True)
        mixed = lin(t, f"{b}.self_attn.dense", mixed, lora, SCALE)
        mixed = mixed / (mixed.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * t[f"{b}.post_layernorm.weight"]
        x = x + mixed + lin(t, f"{b}.mlp.fc2", F.gelu(lin(t, f"{b}.mlp.fc1", h), approximate="tanh"))
    return lin(t, "lm_head", ln(t, "model.final_layernorm", x))


SCALE = 16 / RANK
