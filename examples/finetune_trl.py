"""Fine-tune a PointAlign model with TRL's SFTTrainer: `python examples/finetune_trl.py`.

The model is tiny and random, so that this runs anywhere in seconds; with `pointalign.load()` it is the same code (train
LoRA then: `peft_config=LoraConfig(target_modules="all-linear")` of SFTTrainer).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Blip2QFormerConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from pointalign import (
    PointAlignConfig,
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignProcessor,
)
from pointalign.data.collator import ConversationCollator
from pointalign.data.dataset import ConversationDataset
from pointalign.models import PointBertConfig


def tiny() -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PointAlignConfig(
        text_config=LlamaConfig(
            **sizes, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=256, pad_token_id=257
        ),
        point_config=PointBertConfig(**sizes, num_groups=16, group_size=8, group_dim=16),
        qformer_config=Blip2QFormerConfig(**sizes, encoder_hidden_size=32),
        num_query_tokens=4,
        projector_hidden_size=32,
    )
    extractor = PointAlignFeatureExtractor(num_points=128, min_points=16)
    return PointAlignForConditionalGeneration(config), PointAlignProcessor(extractor, tokenizer, num_query_tokens=4)


def write_data(folder: Path) -> Path:
    """A red and a green cloud with a question each, in the schema that `pointalign annotate` writes."""
    entries = []
    for name, colour in {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0]}.items():
        xyz = np.random.default_rng(0).normal(size=(256, 3))
        np.save(folder / f"{name}.npy", np.hstack([xyz, np.tile(colour, (256, 1))]).astype(np.float32))
        turns = [{"from": "human", "value": "<point>\nWhat colour?"}, {"from": "gpt", "value": f"It is {name}."}]
        entries.append({"object_id": f"{name}.npy", "conversations": turns})
    (folder / "annotations.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "annotations.json"


def main(steps: int = 40) -> list[float]:
    """Returns the logged losses."""
    torch.manual_seed(0)
    model, processor = tiny()
    with tempfile.TemporaryDirectory() as folder:
        conversations = ConversationDataset(write_data(Path(folder)), folder)
        collate = ConversationCollator(processor, max_length=256)
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=5,
                report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, save_strategy="no",
                gradient_checkpointing=False, max_length=None, remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},  # our collator does it
            ),
            train_dataset=Dataset.from_list([{"row": row} for row in range(len(conversations))]),
            data_collator=lambda rows: collate([conversations[row["row"]] for row in rows]),
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
