"""What `attach` needs to know of a multimodal model of transformers: its tokens, its decoder layers, its outputs."""

from collections.abc import Sequence
from typing import Any

from torch import nn

MOST_LEARNED = 8  # layers that layers="learned" weighs
TOKEN_NAMES = {
    "<image>": ("image_token_id", "image_token_index"),
    "<video>": ("video_token_id", "video_token_index"),
    "<point>": ("point_token_id",),
}
LAYER_LISTS = ("layers", "h", "blocks")  # names of a decoder's list of layers


def base_model(model: nn.Module) -> Any:
    """The transformers model, out of peft's wrapper. Raises: ValueError: wrapped in something else already."""
    for wrapper, when in (("_orig_mod", "torch.compile"), ("module", "DistributedDataParallel")):
        if hasattr(model, wrapper) and not hasattr(model, "config"):
            raise ValueError(f"attach before {when}: the model is wrapped already")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("attach before torch.compile: compiled code does not see hooks that come later")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(base, "config") or not hasattr(base, "get_decoder"):
        raise ValueError(f"expected a multimodal model of transformers, got {type(base).__name__}")
    return base


def token_id(configuration: Any, tokens: str | int | None) -> int:
    if isinstance(tokens, int):
        return tokens
    name = tokens or ("<point>" if hasattr(configuration, "point_token_id") else "<image>")
    if name not in TOKEN_NAMES:
        raise ValueError(
            f"tokens={name!r}: expected of {', '.join(TOKEN_NAMES)}; of other tokens give the id, "
            f"tokenizer.convert_tokens_to_ids({name!r})"
        )
    ids = [getattr(configuration, field, None) for field in TOKEN_NAMES[name]]
    known = next((token_id for token_id in ids if token_id is not None), None)
    if known is None:
        raise ValueError(f"the configuration of the model has no {TOKEN_NAMES[name][0]}: give the token id")
    return known


def decoder_layers(model: Any) -> nn.ModuleList:
    """Raises: ValueError: no list of decoder layers, or an encoder-decoder, whose encoder reads the tokens."""
    text_config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False) or getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder-decoder language model; expected a decoder alone")
    decoder = model.get_decoder()
    for _ in range(3):
        for name in LAYER_LISTS:
            if isinstance(getattr(decoder, name, None), nn.ModuleList):
                return getattr(decoder, name)
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            break
        decoder = inner
    raise ValueError(f"no list of decoder layers in {type(decoder).__name__}: expected one of {', '.join(LAYER_LISTS)}")


def chosen_layers(layers: int | Sequence[int] | str | None, num_layers: int) -> list[int]:
    if layers is None:
        return []
    if isinstance(layers, int):
        return [layers]
    if layers == "learned":
        last = max(1, num_layers - 1)  # the last layer's output only predicts the next token
        count = min(MOST_LEARNED, last)
        return sorted({round((i + 1) * last / count) for i in range(count)})
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: expected a number, several numbers, or 'learned'")
    return list(layers)
