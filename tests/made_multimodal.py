"""Tiny random multimodal models of transformers, and a batch of two samples for each."""

import torch

IMAGE, VOCABULARY = 120, 128
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return LlavaForConditionalGeneration(config), images(), 16


def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(**VISION | {"image_size": [16, 16], "patch_size": [4, 4]})
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config), images(), 4


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=32)
    vision = SiglipVisionConfig(**VISION)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero by default
    return model, images(), 4


def smolvlm():
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config=VISION, text_config=LlamaConfig(**TEXT).to_dict(), image_token_id=IMAGE, scale_factor=2
    )
    return SmolVLMForConditionalGeneration(config), images(per_sample=True), 4


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    config = Idefics3Config(
        vision_config=VISION, text_config=LlamaConfig(**TEXT).to_dict(), image_token_id=IMAGE, scale_factor=2
    )
    return Idefics3ForConditionalGeneration(config), images(per_sample=True), 4


QWEN_SPECIAL = {
    "image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123,
}  # fmt: skip


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **QWEN_SPECIAL)
    return Qwen2_5_VLForConditionalGeneration(config), patches(), 4


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "head_dim": 8}, vision_config=vision, **QWEN_SPECIAL
    )
    return Qwen3VLForConditionalGeneration(config), patches(), 4


def blip2():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 256, "word_embed_proj_dim": 32, "pad_token_id": 0,
    }  # fmt: skip
    qformer = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "encoder_hidden_size": 24, "vocab_size": VOCABULARY,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_id=IMAGE
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)  # zero by default
    return model, images(), 4


def images(per_sample: bool = False) -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels[:, None] if per_sample else pixels}


def patches() -> dict[str, torch.Tensor]:
    """Two images of 4 x 4 patches, each 3 channels x 2 frames x 4 x 4 pixels, as Qwen's processor lays them out."""
    pixels = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def point_align():
    from conftest import tiny_model

    clouds = torch.rand(2, 64, 6, generator=torch.Generator().manual_seed(1))
    return tiny_model(), {"point_values": clouds}, 4


MODELS = {
    "LLaVA": llava, "InternVL": internvl, "Gemma 3": gemma3, "SmolVLM": smolvlm, "Idefics 3": idefics3,
    "Qwen2.5-VL": qwen2_5_vl, "Qwen3-VL": qwen3_vl, "BLIP-2": blip2, "PointAlign": point_align,
}  # fmt: skip


def make(name: str):
    """A model in training mode and a batch: two samples of different length, each with an image or a cloud."""
    torch.manual_seed(0)
    model, inputs, count = MODELS[name]()
    ids = torch.randint(3, 100, (2, count + 12), generator=torch.Generator().manual_seed(2))
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[0, 2 : 2 + count] = places[1, 4 : 4 + count] = True
    attention = torch.ones_like(ids)
    attention[1, -3:] = 0
    labels = ids.masked_fill(places | (attention == 0), -100)
    labels[:, : count + 4] = -100
    batch = inputs | {"input_ids": ids.masked_fill(places, IMAGE), "attention_mask": attention, "labels": labels}
    if name == "PointAlign":
        batch["point_mask"] = places
    if name == "Gemma 3":
        batch["token_type_ids"] = places.long()
    if name.startswith("Qwen"):
        batch["mm_token_type_ids"] = places.int()
    return model.train(), batch, places
