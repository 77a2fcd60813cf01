"""Configurations of the point encoder and of the model, and the two presets of their sizes."""

from typing import Any, ClassVar

from transformers import AutoConfig, Blip2QFormerConfig, LlamaConfig, PreTrainedConfig


class PointBertConfig(PreTrainedConfig):
    """PointBERT encoder, `points [B, N, in_channels] -> tokens [B, 1 + num_groups, hidden_size]`.

    The defaults are the published encoder (21,859,200 parameters).

    Args:
        in_channels: xyz and features per point.
        num_points: larger clouds are subsampled to this many points before they are encoded.
        num_groups: G, centres chosen by farthest-point sampling.
        num_training_groups: while the encoder trains, use only the first so many centres, which lie as far apart as
            they can: a step costs less. None for all.
        group_size: k, nearest neighbours per centre.
        group_dim: width of the mini-PointNet's output per group (`encoder_dims` of the published code).
        pointnet_width: width of the mini-PointNet between its two halves. None for `group_dim`, to which it is equal
            in the published encoder.
        hidden_size: width of the tokens.
    """

    model_type = "pointalign_pointbert"
    base_config_key = "point_config"

    in_channels: int = 6
    num_points: int = 8192
    num_groups: int = 512
    num_training_groups: int | None = None
    group_size: int = 32
    group_dim: int = 256
    pointnet_width: int | None = None
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02


class PointAlignConfig(PreTrainedConfig):
    """Point encoder, Q-Former, modality projector and any causal language model.

    Args:
        text_config: configuration of the language model, of any `model_type` that AutoModelForCausalLM knows.
        point_config: configuration of the point encoder; its `hidden_size` is the width of the tokens.
        qformer_config: `Blip2QFormerConfig`; `encoder_hidden_size` is the output width of the point MLP.
        point_token_id: the id written at the places of point tokens. `point_mask` alone says which places those are,
            so any id of the vocabulary will do and the embedding matrix stays as large as it is.
        num_query_tokens: Q, point tokens per cloud.
        projector_hidden_size: width between the two linear layers of the modality projector.
        num_query_experts: sets of queries between which a router chooses, 0 for a single set without a router;
            `query_routing` and `query_top_k` as in `QueryExperts`.
        name_threshold: names of a lower probability are hedged, see `pointalign.certainty`; 0 hedges none.
        adapters: LoRA stored beside the weights, not in them: arguments of `peft.LoraConfig` by part
            (`language_model`, `qformer`). None for no adapters.
    """

    model_type = "pointalign"
    sub_configs: ClassVar = {
        "text_config": AutoConfig,
        "point_config": AutoConfig,
        "qformer_config": Blip2QFormerConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    point_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    point_token_id: int = 0
    num_query_tokens: int = 32
    projector_hidden_size: int = 4096
    num_query_experts: int = 0
    query_routing: str = "sparse"
    query_top_k: int = 2
    name_threshold: float = 0.0
    adapters: dict | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.text_config = _sub_config(self.text_config, LlamaConfig())
        self.point_config = _sub_config(self.point_config, PointBertConfig())
        if isinstance(self.qformer_config, dict):
            self.qformer_config = Blip2QFormerConfig(**self.qformer_config)
        self.qformer_config = self.qformer_config or Blip2QFormerConfig()
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        attention = self.text_config._attn_implementation
        super().__post_init__(**kwargs)
        # The base class sets its attention implementation, None at this point, in all parts. A language model that
        # exists already shares `text_config`, and without an attention implementation it would lose its causal mask.
        if "attn_implementation" not in kwargs:
            self.text_config._attn_implementation = attention

    @classmethod
    def from_preset(cls, preset: str, text_config: PreTrainedConfig, **overrides: Any) -> "PointAlignConfig":
        """A configuration with the sizes of a preset in front of a language model.

        Args:
            preset: `minigpt3d-phi2` (the paper's sizes) or `mini` (the embedded model's).
            text_config: of the language model.
            overrides: other values for arguments of this class.

        Raises: ValueError: an unknown preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
        sizes = PRESETS[preset]
        return cls(
            text_config=text_config,
            point_config=PointBertConfig(**sizes["point_config"]),
            qformer_config=Blip2QFormerConfig(**sizes["qformer_config"]),
            **(sizes["model"] | overrides),
        )


def _sub_config(value: dict | PreTrainedConfig | None, default: PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(value, dict):
        return AutoConfig.for_model(**value)
    return value if value is not None else default


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "minigpt3d-phi2": {"model": {}, "point_config": {}, "qformer_config": {}},
    "mini": {
        # In layers this narrow BERT's initial standard deviation, 0.02, makes activations vanish; 0.07 keeps them.
        "model": {"projector_hidden_size": 384, "initializer_range": 0.07},
        "point_config": {
            "num_points": 1024,  # 64 groups of 32 then cover the surface twice
            "num_groups": 64,
            "num_training_groups": 32,
            "group_dim": 96,
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 768,
        },
        "qformer_config": {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 768,
            "encoder_hidden_size": 192,
            "initializer_range": 0.07,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    },
}
