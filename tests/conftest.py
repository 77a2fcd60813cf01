"""Small real parts: a tokenizer, language models of three architectures and the committed clouds."""

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CLOUDS = Path(__file__).parent / "clouds"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE without merges and ChatML marks: any text, 259 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_text_config(architecture: str):
    from transformers import LlamaConfig, PhiConfig, Qwen3Config

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 259,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    if architecture == "phi":
        return PhiConfig(**sizes, partial_rotary_factor=0.5)
    if architecture == "qwen3":
        return Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return LlamaConfig(**sizes, num_key_value_heads=2)


TINY_SIZES = {
    "num_query_tokens": 4,
    "projector_hidden_size": 16,
}


def tiny_config(architecture: str = "llama"):
    from transformers import Blip2QFormerConfig

    from pointalign.models import PointAlignConfig, PointBertConfig

    point = PointBertConfig(
        num_groups=8,
        group_size=4,
        group_dim=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=16
    )
    return PointAlignConfig(
        text_config=tiny_text_config(architecture), point_config=point, qformer_config=qformer, **TINY_SIZES
    )


def tiny_model(architecture: str = "llama", seed: int = 0):
    import torch

    from pointalign.models import PointAlignForConditionalGeneration

    torch.manual_seed(seed)
    return PointAlignForConditionalGeneration(tiny_config(architecture)).eval()


@pytest.fixture(scope="session")
def processor(tokenizer):
    from pointalign.models import PointAlignFeatureExtractor, PointAlignProcessor

    extractor = PointAlignFeatureExtractor(num_points=256, min_points=8)
    return PointAlignProcessor(extractor, tokenizer, num_query_tokens=4)


@pytest.fixture(scope="session")
def clouds() -> list[np.ndarray]:
    """The committed clouds `[2048, 6]`."""
    return [np.load(path).astype(np.float32) for path in sorted(CLOUDS.glob("*.npy"))]


def user(text: str, *given) -> dict:
    """A user's message with clouds before the text."""
    return {
        "role": "user",
        "content": [*({"type": "point", "point": one} for one in given), {"type": "text", "text": text}],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def lively(model, seed: int = 0):
    """Weights large enough that every cloud and every word moves the answers; batch statistics away from 0 and 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2 / tensor.shape[-1] ** 0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 2)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            elif isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 5)
    return model


def without_dropout(model):
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def point_inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name.startswith("point_") and name != "point_mask"}
