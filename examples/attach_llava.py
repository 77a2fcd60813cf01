"""Add the alignment loss to a LLaVA-class model and train five steps: `python examples/attach_llava.py`.

The model is tiny and random, so that this runs anywhere in seconds; with `from_pretrained` it is the same code.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import pointalign

IMAGE = 99  # the id of <image>; of a real model its configuration names it


def tiny_llava() -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)
    text = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=100)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))


def main() -> list[float]:
    """Returns the alignment loss of each step."""
    torch.manual_seed(0)
    model = tiny_llava().train()
    images = torch.randn(2, 3, 32, 32)
    question, answer = torch.randint(99, (2, 4)), torch.randint(99, (2, 6))
    input_ids = torch.cat([torch.full((2, 16), IMAGE), question, answer], dim=1)  # 16 patches an image
    labels = torch.cat([torch.full((2, 20), -100), answer], dim=1)

    handle = pointalign.attach(model, tokens="<image>", layers=2, target="projector_input", weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(5):
        loss = model(input_ids=input_ids, pixel_values=images, labels=labels).loss  # both terms
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(handle.losses["alignment_loss"].item())
        print(f"step {step + 1}: token loss {handle.losses['token_loss']:.3f}, alignment loss {losses[-1]:.3f}")
    handle.detach()  # the model is a plain LLaVA again
    return losses


if __name__ == "__main__":
    main()
