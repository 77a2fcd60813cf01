"""Samples of a `ConversationDataset` become one padded batch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointalign.data.augment import augment

POSE_FREE = "simple_description"  # naming does not depend on the pose; sides and symmetry are the object's own


class ConversationCollator:
    """Chat samples to tensors with labels on the answers.

    Args:
        processor: a `PointAlignProcessor`.
        max_length: the most tokens of a sample; a longer one is cut at the right, never through a cloud.
        augmentation: show every cloud differently each time, with randomness from PyTorch's global generator, so that
            a resumed run continues it.
    """

    def __init__(self, processor: Any, max_length: int, augmentation: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.augmentation = augmentation

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        conversations = [sample["messages"] for sample in samples]
        if self.augmentation:
            rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
            conversations = [
                [self._augmented(message, rng, sample["conversation_type"] == POSE_FREE) for message in conversation]
                for conversation, sample in zip(conversations, samples, strict=True)
            ]
        return dict(
            self.processor.apply_chat_template(
                conversations, tokenize=True, return_labels=True, truncation=True, max_length=self.max_length
            )
        )

    def _augmented(self, message: dict, rng: np.random.Generator, pose_free: bool) -> dict:
        fewest = self.processor.feature_extractor.min_points
        content = [
            item | {"point": augment(item["point"], rng, pose_free, fewest)} if item["type"] == "point" else item
            for item in message["content"]
        ]
        return message | {"content": content}
