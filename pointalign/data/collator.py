"""Samples of a `ConversationDataset` become one padded batch."""

from typing import Any

import numpy as np
from torch import Tensor

from pointalign.data.augment import augment

POSE_FREE = "simple_description"  # naming does not depend on the pose; sides and symmetry are the object's own


class ConversationCollator:
    """Chat samples to tensors with labels on the answers.

    Args:
        processor: a `PointAlignProcessor`.
        max_length: the most tokens of a sample; a longer one is cut at the right, never through a cloud.
        augmentation: show every cloud differently in every epoch. What it draws depends on the sample and the epoch
            only, so that a resumed run continues exactly.
    """

    def __init__(self, processor: Any, max_length: int, augmentation: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.augmentation = augmentation

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        conversations = [self._augmented(sample) if self.augmentation else sample["messages"] for sample in samples]
        return dict(
            self.processor.apply_chat_template(
                conversations, tokenize=True, return_labels=True, truncation=True, max_length=self.max_length
            )
        )

    def _augmented(self, sample: dict) -> list[dict]:
        rng = np.random.default_rng(sample["draw"])
        pose_free = sample["conversation_type"] == POSE_FREE
        fewest = self.processor.feature_extractor.min_points

        def view(item: dict) -> dict:
            if item["type"] != "point":
                return item
            return item | {"point": augment(item["point"], rng, pose_free, fewest)}

        return [message | {"content": [view(item) for item in message["content"]]} for message in sample["messages"]]
