"""Rules that translate tensor names of the published files into this package's names.

Sources: the released code of MiniGPT-3D, PointAlign, PointLLM and BLIP-2 (LAVIS). A name that no rule explains is an
error.
"""

import re
from collections.abc import Iterable, Iterator

from pointalign.models.adapters import LLM, LLM_TARGETS, QFORMER, QFORMER_TARGETS, is_llm_norm, is_qformer_norm

ENCODER = "model.point_encoder."
EXPERT = "model.query_experts.queries."  # + index: the files hold a tensor per expert
ALIGNMENT = "alignment_projector."

_CHECKPOINT_RULES = [
    (r"point_2_Qformer_proj\.", "model.point_mlp."),
    (r"llama_proj\.", "model.modality_projector.0."),
    (r"llama_proj2\.", "model.modality_projector.1."),
    (r"query_tokens$", "model.query_tokens"),
    (r"query_expert_dict\.", EXPERT),
    (r"query_router\.", "model.query_experts.router."),
    (r"alignment_projector\.", ALIGNMENT),
    (r"(point_encoder|pc_encoder)\.", ENCODER),  # two names of one module
    (r"Qformer\.bert\.", QFORMER),
    (r"llama_model\.(base_model\.model\.)?", LLM),
    (r"model\.(point_|query_|qformer\.|modality_|language_model\.)", r"model.\1"),  # parts converted earlier
]
_RULES = {
    "llm": [(r"(?=model\.|lm_head\.)", LLM)],
    "qformer": [(r"query_tokens$", "model.query_tokens"), (r"Qformer\.bert\.", QFORMER)],
    "point_encoder": [(r"(module\.point_encoder\.)?(?!module\.)", ENCODER)],
    "checkpoint": _CHECKPOINT_RULES,
}
_IGNORED = {
    "llm": [(r".*rotary_emb\.inv_freq$", "computed from the configuration")],
    "qformer": [
        (r"(ln_vision|visual_encoder)\.", "the image branch of BLIP-2"),
        (r"(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head|temp$)", "the heads of BLIP-2"),
        (r"Qformer\.cls\.", "the word prediction head of BLIP-2"),
        (r"Qformer\.bert\.embeddings\.(word|position)_", "the text branch of the Q-Former"),
        (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.", "the text branch of the Q-Former"),
    ],
    "point_encoder": [(r"module\.(?!point_encoder\.)", "not of the point encoder")],
    "checkpoint": [
        (r"visual_encoder\.|ln_vision\.|t5_proj\.", "the image branch of the model it was trained from"),
        (r"llama_model\..*rotary_emb\.inv_freq$", "computed from the configuration"),
    ],
}
_INDICES = (r"Qformer\.bert\.embeddings\.position_ids$", "positions of words that the Q-Former does not read")
_RENAMED = [
    (rf"^{QFORMER}embeddings\.LayerNorm\.", f"{QFORMER}layernorm."),
    (rf"^({QFORMER}.*\.(?:cross)?attention)\.self\.", r"\1.attention."),
    (rf"^({LLM}model\.layers\.\d+)\.post_layernorm\.", r"\1.self_attn.post_layernorm."),
    (r"\.base_layer\.", "."),
]


def translate(role: str, name: str) -> tuple[str | None, str]:
    """This package's name of a tensor in a file of `role` and "", or None and the reason to ignore the tensor.

    Raises:
        KeyError: no rule explains the name.
    """
    for pattern, reason in [*_IGNORED[role], _INDICES]:
        if re.match(pattern, name):
            return None, reason
    for pattern, replacement in _RULES[role]:
        translated, count = re.subn(rf"^{pattern}", replacement, name, count=1)
        if count:
            for old, new in _RENAMED:
                translated = re.sub(old, new, translated)
            return translated, ""
    raise KeyError(name)


def lora_names(names: Iterable[str], prefix: str, targets: list[str]) -> Iterator[str]:
    """Names of the LoRA factors A and B of every module in `targets` whose weight is among `names`."""
    for name in names:
        module, _, kind = name.rpartition(".")
        if name.startswith(prefix) and kind == "weight" and module.rpartition(".")[2] in targets:
            yield f"{module}.lora_A.default.weight"
            yield f"{module}.lora_B.default.weight"


def bundles(names: Iterable[str], num_experts: int) -> dict[str, set[str]]:
    """Sets of tensors of which a file holds all or none; the keys describe them for error messages.

    Args:
        names: of all weights of the model, without adapters.
        num_experts: query experts of the model, 0 for none.
    """
    names = set(names)
    return {
        "the adapters and norms of the language model": {
            *lora_names(names, LLM, LLM_TARGETS),
            *filter(is_llm_norm, names),
        },
        "the adapters and norms of the Q-Former": {
            *lora_names(names, QFORMER, QFORMER_TARGETS),
            *filter(is_qformer_norm, names),
        },
        "the point MLP": {name for name in names if name.startswith("model.point_mlp.")},
        "the modality projector": {name for name in names if name.startswith("model.modality_projector.")},
        "the query experts": {
            *(f"{EXPERT}{index}" for index in range(num_experts)),
            *(name for name in names if name.startswith("model.query_experts.router.")),
        },
        "the alignment projector": {
            f"{ALIGNMENT}projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
        },
    }
