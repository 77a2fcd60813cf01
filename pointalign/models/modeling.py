"""PointAlign: clouds become Q-Former tokens, which a causal language model reads among the tokens of the text.

Shape legend: B rows of text, T tokens per row; C clouds of all rows, row by row in reading order; N points of F
features beside xyz; T' tokens of width D from the point encoder; Q query tokens per cloud of width Dq from the
Q-Former; H width of the language model.
"""

import inspect
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Blip2QFormerModel, PreTrainedModel
from transformers.generation import GenerationMixin

from pointalign.models import adapters, saved_folder, serving
from pointalign.models.configuration import PointAlignConfig
from pointalign.models.outputs import PointAlignOutput, PointFeatures
from pointalign.models.point_encoder import QueryExperts

LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
POINT_INPUTS = ("point_values", "point_lengths", "point_mask", "query_features", "encoder_tokens")


class PointAlignPreTrainedModel(PreTrainedModel):
    """What both models below declare to transformers."""

    config_class = PointAlignConfig
    config: PointAlignConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)
    # Sampling and neighbours are exact in fp32 only, and the alignment target must not depend on the LLM's dtype.
    _keep_in_fp32_modules_strict: ClassVar = {
        "point_encoder", "point_mlp", "query_tokens", "query_experts", "qformer", "modality_projector",
    }  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """The language model's, which `save_pretrained` records; the point branch is always fp32."""
        return self.base_model.language_model.dtype

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointAlignModel) and module.query_experts is None:
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)
        elif isinstance(module, QueryExperts):
            nn.init.normal_(module.queries, std=self.config.initializer_range)


class PointAlignModel(PointAlignPreTrainedModel):
    """The point branch and a language model with its head."""

    def __init__(self, config: PointAlignConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        qformer = config.qformer_config
        width = qformer.hidden_size
        self.point_encoder = AutoModel.from_config(config.point_config, trust_remote_code=False)
        self.point_mlp = nn.Sequential(
            nn.Linear(config.point_config.hidden_size, width), nn.GELU(), nn.Linear(width, qformer.encoder_hidden_size)
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.query_experts: QueryExperts | None = None
        if config.num_query_experts:
            self.add_query_experts(config.num_query_experts, config.query_routing, config.query_top_k)
        self.qformer = Blip2QFormerModel(qformer)
        self.modality_projector = nn.Sequential(
            nn.Linear(width, config.projector_hidden_size),
            nn.Linear(config.projector_hidden_size, config.text_config.hidden_size),
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(
            config.text_config, trust_remote_code=False
        )
        self.post_init()

    def add_query_experts(self, num_experts: int, routing: str = "sparse", top_k: int = 2) -> None:
        """Replace the queries by experts, which start as copies of them, and a new router."""
        width = self.config.point_config.hidden_size
        with self.query_tokens.device:
            self.query_experts = QueryExperts(self.query_tokens, num_experts, width, routing, top_k)
        self.query_tokens = None
        self.config.num_query_experts = num_experts
        self.route_queries(routing, top_k)

    def route_queries(self, routing: str, top_k: int) -> None:
        """Change how the router weighs the query experts, see `QueryExperts`."""
        assert self.query_experts is not None
        self.query_experts.routing, self.query_experts.top_k = routing, top_k
        self.config.query_routing, self.config.query_top_k = routing, top_k

    @property
    def point_branch(self) -> list[nn.Module]:
        """The modules between the points and the language model."""
        return [self.point_encoder, self.point_mlp, self.qformer, self.modality_projector]

    def train(self, mode: bool = True) -> "PointAlignModel":
        """A frozen part stays in evaluation mode: its dropout is off and its batch statistics do not move."""
        super().train(mode)
        for part in self.point_branch:
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also from a folder of the class below, whose names begin with `model.`."""
        # Without the mapping transformers takes `model.language_model.model` for an old name and loses those weights.
        kwargs["key_mapping"] = {r"^model\.": ""} | (kwargs.get("key_mapping") or {})
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_encoder_tokens(self, point_values: Tensor, point_lengths: Tensor | None = None) -> Tensor:
        """Tokens `[C, T', D]` of clouds `[C, N, 3 + F]`, of which `point_lengths [C]` points are real.

        Clouds of the same size are encoded together, without their padding.
        """
        weight = next(self.point_encoder.parameters(), None)
        if weight is not None:
            point_values = point_values.to(weight.device)
        if point_lengths is None or bool((point_lengths == point_values.shape[1]).all()):
            return self.point_encoder(point_values)
        lengths = point_lengths.tolist()
        encoded, tokens = [], []
        for length in sorted(set(lengths)):
            clouds = [cloud for cloud, other in enumerate(lengths) if other == length]
            encoded += clouds
            tokens.append(self.point_encoder(point_values[clouds, :length]))
        order = torch.tensor(encoded, device=point_values.device).argsort()
        return torch.cat(tokens)[order]

    def query(self, tokens: Tensor) -> Tensor:
        """Q-Former tokens `[C, Q, Dq]` of encoder tokens `[C, T', D]`."""
        keys = self.point_mlp(tokens)
        if self.query_experts is None:
            queries = self.query_tokens.expand(len(tokens), -1, -1)
            return self.qformer(query_embeds=queries, encoder_hidden_states=keys).last_hidden_state
        queries, weights = self.query_experts(tokens)  # [C, K, Q, Dq], [C, K]
        keys = keys.repeat_interleave(queries.shape[1], dim=0)
        outputs = self.qformer(query_embeds=queries.flatten(0, 1), encoder_hidden_states=keys).last_hidden_state
        return torch.einsum("ckqd,ck->cqd", outputs.unflatten(0, queries.shape[:2]), weights.to(outputs))

    def encode_point_clouds(self, points: Tensor, point_lengths: Tensor | None = None) -> PointFeatures:
        """The tokens of clouds `[C, N, 3 + F]`, normalised as the feature extractor does, after each stage."""
        tokens = self.get_encoder_tokens(points, point_lengths)
        qformer = self.query(tokens)
        return PointFeatures(encoder=tokens, qformer=qformer, projected=self.modality_projector(qformer))

    def get_placeholder_mask(self, input_ids: Tensor, point_mask: Tensor | None, num_clouds: int) -> Tensor:
        """`point_mask [B, T]` as bool. Raises: ValueError: it is missing or has not exactly Q places per cloud."""
        expected = num_clouds * self.config.num_query_tokens
        if point_mask is None:
            raise ValueError("expected `point_mask` beside the clouds: it says where their tokens belong")
        point_mask = point_mask.bool()
        places = point_mask.sum(dim=-1).reshape(-1).tolist()  # of every row; waits for the device once
        if point_mask.shape != input_ids.shape or sum(places) != expected:
            raise ValueError(
                f"{num_clouds} clouds need {expected} places in a point_mask of shape {list(input_ids.shape)}, "
                f"got {sum(places)} places in shape {list(point_mask.shape)}"
            )
        if any(count % (queries := self.config.num_query_tokens) for count in places):
            raise ValueError(f"every row needs a multiple of {queries} places for point tokens, got {places}")
        return point_mask

    def embed(
        self,
        input_ids: Tensor | None,
        point_values: Tensor | None = None,
        point_lengths: Tensor | None = None,
        point_mask: Tensor | None = None,
        query_features: Tensor | None = None,
        encoder_tokens: Tensor | None = None,
    ) -> tuple[Tensor, PointFeatures | None]:
        """Input embeddings `[B, T, H]` with the clouds' tokens at their places, and the clouds' features.

        Arguments of `PointAlignForConditionalGeneration`. Raises: ValueError: clouds and places do not match.
        """
        if input_ids is None:
            raise ValueError("expected either input_ids or inputs_embeds, got neither")
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if point_values is None and query_features is None:
            if point_mask is not None and bool(point_mask.any()):
                raise ValueError("`point_mask` has places for point tokens: expected point_values or query_features")
            return inputs_embeds, None
        if query_features is not None:
            query_features = query_features.to(self.modality_projector[0].weight.dtype)
            features = PointFeatures(encoder_tokens, query_features, self.modality_projector(query_features))
        else:
            assert point_values is not None
            features = self.encode_point_clouds(point_values, point_lengths)
        mask = self.get_placeholder_mask(input_ids, point_mask, len(features.projected))
        projected = features.projected.to(inputs_embeds)
        return inputs_embeds.masked_scatter(mask[..., None], projected), features

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        point_values: Tensor | None = None,
        point_lengths: Tensor | None = None,
        point_mask: Tensor | None = None,
        query_features: Tensor | None = None,
        **kwargs: Any,
    ):
        """Hidden states of the language model, without its head; arguments of `PointAlignForConditionalGeneration`."""
        if inputs_embeds is None:
            inputs_embeds, _ = self.embed(input_ids, point_values, point_lengths, point_mask, query_features)
        return self.language_model.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class PointAlignForConditionalGeneration(PointAlignPreTrainedModel, GenerationMixin):
    """A language model that reads point clouds.

    Inputs beside those of the language model:
        point_values: `[C, N, 3 + F]` clouds, centred and scaled to the unit sphere, colours in 0..1.
        point_lengths: `[C]` real points of each cloud; None where all are.
        point_mask: `[B, T]`, true at the Q places of every cloud.
        query_features: `[C, Q, Dq]` outputs of the Q-Former that replace `point_values`.
        encoder_tokens: `[C, T', D]` beside `query_features`, where the alignment loss compares with the encoder.
        logits_to_keep: logits of this many last places only, or of these places; 0 for all. `generate` asks for 1.
    """

    def __init__(self, config: PointAlignConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = PointAlignModel(config, language_model)
        self.post_init()

    @classmethod
    def from_language_model(cls, language_model: PreTrainedModel, preset: str, **overrides: Any):
        """A new point branch with a preset's sizes, drawn from torch's global generator, for an existing LLM."""
        # A copy: a new outer configuration resets choices of its parts, such as the attention implementation.
        config = PointAlignConfig.from_preset(preset, deepcopy(language_model.config), **overrides)
        model = cls(config, language_model)
        if language_model.can_generate():
            model.generation_config = language_model.generation_config
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but all weights or an error; the folder's adapters are added.

        Raises: ValueError: weights are missing, unexpected or of another shape.
        """
        with_info = kwargs.pop("output_loading_info", False)
        folder = pretrained_model_name_or_path
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        problems = [
            f"{kind.removesuffix('_keys')} {key}" for kind in LOADING_PROBLEMS for key in sorted(info[kind], key=str)
        ]
        if problems:
            raise ValueError(f"{folder} does not fit its model ({len(problems)} problems): {', '.join(problems[:5])}")
        if model.config.adapters:
            adapters.load(model, folder)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any) -> None:
        """As in transformers; adapters are written to a separate file."""
        if self.config.adapters:
            kwargs["state_dict"] = adapters.base_state(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.config.adapters:
            adapters.save(self, save_directory)
        saved_folder.name_package(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.model.language_model.get_decoder()

    def encode_point_clouds(self, points: Tensor, point_lengths: Tensor | None = None) -> PointFeatures:
        return self.model.encode_point_clouds(points, point_lengths)

    def get_qformer_features(self, point_values: Tensor, point_lengths: Tensor | None = None) -> Tensor:
        """Q-Former tokens `[C, Q, Dq]` of clouds `[C, N, 3 + F]`."""
        return self.model.query(self.model.get_encoder_tokens(point_values, point_lengths))

    def prompt_embeddings(self, inputs: Any, processor: Any = None) -> list[Tensor]:
        """What engines that take prompt embeddings read: `[T, H]` for each prompt, clouds included, without padding.

        Args:
            inputs: the processor's tensors; or chat messages, a conversation or several, and the processor.

        Raises: ValueError: messages without a processor.
        """
        return serving.prompt_embeddings(self, inputs, processor)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        point_values: Tensor | None = None,
        point_lengths: Tensor | None = None,
        point_mask: Tensor | None = None,
        query_features: Tensor | None = None,
        encoder_tokens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> PointAlignOutput:
        features = None
        if inputs_embeds is None:
            inputs_embeds, features = self.model.embed(
                input_ids, point_values, point_lengths, point_mask, query_features, encoder_tokens
            )
        if labels is not None and self.training and not self._rescales_logits:
            loss = self._supervised_loss(inputs_embeds, attention_mask, labels, **kwargs)
            return PointAlignOutput(loss=loss, point_features=features)
        language_model = self.model.language_model
        slices = "logits_to_keep" in inspect.signature(language_model.forward).parameters
        if slices:
            kwargs["logits_to_keep"] = logits_to_keep
        outputs = language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return PointAlignOutput(
            loss=outputs.loss,
            logits=outputs.logits if slices else outputs.logits[:, places],
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            point_features=features,
        )

    @property
    def _rescales_logits(self) -> bool:
        """Whether the language model does more than a linear map after its last hidden state."""
        text_config = self.config.text_config
        names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        return any(getattr(text_config, name, None) not in (None, 1, 1.0) for name in names)

    def _supervised_loss(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Next-token loss; scores only the rows with a label: most places are cloud or question."""
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        places = (following != -100).nonzero()[:, 0]  # before the decoder, where the device has little to wait for
        decoder = self.model.language_model.get_decoder()
        hidden = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, places)
        total = self.supervised_cross_entropy(rows, following.index_select(0, places))
        return total / (len(places) if num_items_in_batch is None else num_items_in_batch)

    def supervised_cross_entropy(self, rows: Tensor, targets: Tensor) -> Tensor:
        """fp32 sum of next-token losses of hidden states `[R, H]` with targets `[R]`."""
        logits = self.get_output_embeddings()(rows).float()  # [R, vocabulary]
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, is_first_iteration: bool = False, **kwargs: Any
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in POINT_INPUTS:  # the clouds are in the cache
                inputs.pop(name, None)
        elif inputs.get("point_mask") is not None:
            new_tokens = input_ids.shape[1] - inputs["point_mask"].shape[1]  # without a cache all text is read again
            unread = inputs["input_ids"].shape[1]  # an earlier `generate` may have read what is before
            inputs["point_mask"] = nn.functional.pad(inputs["point_mask"], (0, new_tokens))[:, -unread:]
            if not inputs["point_mask"].any() and past_key_values is not None and past_key_values.get_seq_length():
                inputs = {name: value for name, value in inputs.items() if name not in POINT_INPUTS}
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any):
        """Beams copy each row of text; the copies of a row's clouds must follow in the same order."""
        clouds = {name: kwargs.pop(name) for name in POINT_INPUTS if name != "point_mask" and name in kwargs}
        if expand_size > 1 and kwargs.get("point_mask") is not None:
            counts = kwargs["point_mask"].sum(dim=1).div(self.config.num_query_tokens, rounding_mode="floor").tolist()
            order, first = [], 0
            for count in counts:
                order += list(range(first, first + count)) * expand_size
                first += count
            clouds = {name: value if value is None else value[order] for name, value in clouds.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, kwargs | clouds
