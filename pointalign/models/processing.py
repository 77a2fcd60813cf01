"""From files and chat messages to tensors: the feature extractor for clouds and the processor for both.

`point_mask` says which places of a text belong to clouds, from the message to the model. A chat template sees a marker
in a cloud's place that occurs nowhere in the typed text, so a typed `<point>` is plain text, and so is a typed control
token such as `<|im_end|>`.
"""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from pointalign.data.collator import IGNORED
from pointalign.data.conversations import POINT_MARKER
from pointalign.data.point_cloud import load_point_cloud
from pointalign.data.prepare import prepare_cloud
from pointalign.models import saved_folder
from pointalign.models.chat_layout import (
    PLAIN_CHAT_TEMPLATE,
    answer_end,
    control_tokens,
    find_answers,
    token_id,
    unused,
)

SEAM = "\ue000"  # of the private use area: where the text is cut before it is tokenized


class PointAlignFeatureExtractor(FeatureExtractionMixin):
    """Clouds of any size become one tensor: subsampled, centred, scaled to the unit sphere, padded to the longest.

    Args:
        num_points: larger clouds are subsampled to this many points.
        min_points: the fewest points that the point encoder can group.
        up_axis: the vertical axis of clouds that are read from files; prepared clouds have y up.
        num_channels: 6, xyz and rgb in 0..1.
        reading: further options of `load_point_cloud`, such as missing_color.
    """

    model_input_names = ("point_values", "point_lengths")

    def __init__(
        self,
        num_points: int = 8192,
        min_points: int = 32,
        up_axis: str = "y",
        num_channels: int = 6,
        reading: dict | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_points = num_points
        self.min_points = min_points
        self.up_axis = up_axis
        self.num_channels = num_channels
        self.reading = reading or {}

    def prepare(self, cloud: Any) -> np.ndarray:
        """A cloud as the model reads it, `[min(N, num_points), num_channels]`.

        Args:
            cloud: a path, or an array `[N, 3 + F]` with colours in 0..1.

        Raises: PointCloudError: another shape, values that are not finite, colours out of range, or too few points.
        """
        if isinstance(cloud, (str, Path)):
            cloud = load_point_cloud(cloud, self.up_axis, **self.reading)
        return prepare_cloud(cloud, self.num_points, self.min_points, self.num_channels)

    def __call__(self, points: Sequence[Any], return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """`point_values [C, N, num_channels]`, padded with zeros, and `point_lengths [C]`, the real points of each."""
        clouds = [self.prepare(cloud) for cloud in points]
        lengths = [len(cloud) for cloud in clouds]
        values = np.zeros((len(clouds), max(lengths), self.num_channels), dtype=np.float32)
        for row, cloud in enumerate(clouds):
            values[row, : len(cloud)] = cloud
        data = {"point_values": values, "point_lengths": np.array(lengths, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)


class PointAlignProcessor(ProcessorMixin):
    """Tokenizer and feature extractor together.

    Args:
        feature_extractor: `PointAlignFeatureExtractor`.
        tokenizer: the language model's.
        num_query_tokens: Q, places in the text per cloud.
        point_token_id: the id written at those places.
        point_prefix, point_suffix: text around every cloud.
        chat_template: by default the tokenizer's, or the layout of the published training runs where it has none:
            `BOS [INST] <PC>...</PC> question  [/INST]answer###`, and so on for every turn.
    """

    def __init__(
        self,
        feature_extractor: PointAlignFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        num_query_tokens: int = 32,
        point_token_id: int = 0,
        point_prefix: str = "<PC>",
        point_suffix: str = "</PC> ",
    ):
        self.num_query_tokens = num_query_tokens
        self.point_token_id = point_token_id
        self.point_prefix = point_prefix
        self.point_suffix = point_suffix
        if chat_template is None and tokenizer is not None:
            chat_template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    # -- text with `<point>` markers ---------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        points: Sequence[Any] | None = None,
        padding: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Tensors for texts in which every `<point>` stands for the next cloud.

        Text that users type belongs in `apply_chat_template`, where a typed `<point>` is no placeholder.

        Args:
            text: a text or several.
            points: the clouds of all texts in reading order, as paths or `[N, 6]` arrays.

        Raises: ValueError: markers and clouds differ in number, or truncation would cut a cloud.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        rows = [self._encode([(part, False) for part in _split_at(text, POINT_MARKER)]) for text in texts]
        return self._batch(
            rows, [] if points is None else list(points), padding, truncation, max_length, return_tensors, labels=False
        )

    # -- chat messages -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]  # the inherited function knows images and audio only
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_labels: bool = False,
        padding: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        read_clouds: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Chat messages, with `{"type": "point", "path" | "point": ...}` items, as text or tensors.

        Args:
            conversation: a conversation or a batch of them, in the usual message format.
            add_generation_prompt: end with the opening of an answer.
            tokenize: return tensors; else the rendered text with `<point>` at the clouds' places.
            return_dict: return all tensors; else `input_ids` alone.
            return_labels: add `labels`: the tokens of the assistant's turns with their end mark, -100 elsewhere.
            truncation, max_length: cut each row at the right.
            read_clouds: add the clouds' tensors; off where features that were computed before replace them.
            kwargs: passed on to the tokenizer's chat template.

        Raises:
            ValueError: content other than text and clouds, a template that refuses or loses a turn or a cloud, or a
                row whose cut would go through a cloud or leave nothing to learn from.
        """
        batched = bool(conversation) and isinstance(conversation[0], list)
        conversations: list[list[dict]] = conversation if batched else [conversation]  # type: ignore[assignment]
        template = chat_template or self.chat_template
        rendered = [self._render(messages, template, add_generation_prompt, kwargs) for messages in conversations]
        if not tokenize:
            texts = ["".join(POINT_MARKER if text is None else text for text, _ in parts) for parts, _ in rendered]
            return texts if batched else texts[0]
        rows = [self._encode(parts) for parts, _ in rendered]
        clouds = [cloud for _, clouds in rendered for cloud in clouds]
        batch = self._batch(rows, clouds, padding, truncation, max_length, return_tensors, return_labels, read_clouds)
        return batch if return_dict else batch["input_ids"]

    def _render(
        self, messages: list[dict], template: str, add_generation_prompt: bool, kwargs: dict
    ) -> tuple[list[tuple[str | None, bool]], list[Any]]:
        """Parts `(text, is_answer)` with `None` in the place of each cloud, and the clouds."""
        assert self.tokenizer is not None
        typed = "".join(_texts(messages))
        marker, seam = unused(POINT_MARKER, typed), unused(SEAM, typed)
        controls = [token for token in control_tokens(self.tokenizer, template) if token in typed]
        plain, clouds = [], []
        for message in messages:
            text, clouds_of_message = self._flat_content(message["content"], marker, controls, seam)
            plain.append(message | {"content": text})
            clouds += clouds_of_message
        parts = find_answers(self.tokenizer, template, plain, add_generation_prompt, kwargs)
        pieces: list[tuple[str | None, bool]] = []
        for text, is_answer in parts:
            for piece in _split_at(text, marker):
                pieces += [(cut, is_answer) for cut in ([None] if piece is None else piece.split(seam))]
        places = sum(piece is None for piece, _ in pieces)
        if places != len(clouds):
            raise ValueError(f"the chat template dropped or repeated a point cloud: {places} places of {len(clouds)}")
        return pieces, clouds

    def _flat_content(self, content: str | list[dict], marker: str, controls: list[str], seam: str) -> tuple[str, list]:
        """A message's content as text, the marker in each cloud's place, typed control tokens cut; and the clouds."""
        text, typed, clouds = "", "", []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "point":
                clouds.append(item["path"] if "path" in item else item["point"])
                text += f"{_cut_inside(typed, controls, seam)}{self.point_prefix}{marker}{self.point_suffix}"
                typed = ""
            elif item["type"] == "text":
                typed += item["text"]  # neighbouring items together may spell a control token
            else:
                raise ValueError(f"content of type {item['type']!r}: this model reads 'text' and 'point'")
        return text + _cut_inside(typed, controls, seam), clouds

    def _encode(self, parts: Sequence[tuple[str | None, bool]]) -> dict[str, list]:
        """Token ids, point mask and labels of a row, unpadded; each part is tokenized by itself."""
        assert self.tokenizer is not None
        row: dict[str, list] = {"input_ids": [], "point_mask": [], "labels": []}
        for text, is_answer in parts:
            if text is None:
                ids = [self.point_token_id] * self.num_query_tokens
            else:
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            row["input_ids"] += ids
            row["point_mask"] += [text is None] * len(ids)
            row["labels"] += ids if is_answer else [IGNORED] * len(ids)
        return row

    def _batch(
        self,
        rows: list[dict[str, list]],
        clouds: list[Any],
        padding: bool,
        truncation: bool,
        max_length: int | None,
        return_tensors: str | None,
        labels: bool,
        read_clouds: bool = True,
    ) -> BatchFeature:
        """Pad the rows and add the clouds' tensors."""
        assert self.tokenizer is not None and self.feature_extractor is not None
        spans = sum(sum(row["point_mask"]) for row in rows) // self.num_query_tokens
        if spans != len(clouds):
            raise ValueError(f"expected a cloud for each of the {spans} places in the text, got {len(clouds)} clouds")
        if truncation and max_length is not None:
            for number, row in enumerate(rows):
                self._truncate(row, max_length, number, labels)
        names = ["input_ids", "point_mask"] + (["labels"] if labels else [])
        filler = {"input_ids": self.tokenizer.pad_token_id or 0, "point_mask": False, "labels": IGNORED}
        longest = max(len(row["input_ids"]) for row in rows) if padding else None
        left = not labels  # an answer will be appended on the right
        data: dict[str, Any] = {name: [] for name in [*names, "attention_mask"]}
        for row in rows:
            missing = (longest or len(row["input_ids"])) - len(row["input_ids"])
            columns = {name: row[name] for name in names} | {"attention_mask": [1] * len(row["input_ids"])}
            for name, values in columns.items():
                pad = [filler.get(name, 0)] * missing
                data[name].append(pad + values if left else values + pad)
        batch = BatchFeature(data, tensor_type=return_tensors)
        if clouds and read_clouds:
            batch.update(self.feature_extractor(clouds, return_tensors=return_tensors))
        return batch

    def cut_problem(self, row: dict[str, list], max_length: int, labels: bool = True) -> str:
        """Why a row of `_encode` cannot be cut at `max_length` tokens; "" if it can, or is short enough.

        Args:
            labels: an answer must be left to learn from.
        """
        long = f"has {len(row['input_ids'])} tokens; cutting it at max_length={max_length}"
        if any(row["point_mask"][max_length:]):
            return f"{long} would cut through a point cloud: allow more tokens or shorten the text before the cloud"
        if labels and all(label == IGNORED for label in row["labels"][:max_length]):
            return f"{long} leaves no answer to learn from: allow more tokens or shorten the question"
        return ""

    def _truncate(self, row: dict[str, list], max_length: int, number: int, labels: bool) -> None:
        """Cut a row at `max_length` tokens, in place. Raises: ValueError, see `apply_chat_template`."""
        if problem := self.cut_problem(row, max_length, labels):
            raise ValueError(f"row {number} {problem}")
        for name in row:
            row[name] = row[name][:max_length]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the folder says that it needs pointalign."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        saved_folder.name_package(save_directory)
        return files

    # -- back to text ------------------------------------------------------------------------------------------------

    def answers(self, generated: Tensor, prompt_length: int) -> list[str]:
        """The texts that `generate` appended to the prompts.

        Args:
            generated: `[B, T]`, its output.
            prompt_length: tokens of the padded prompts.

        Returns: B texts without special tokens and without what follows an end mark.
        """
        end = answer_end(self.tokenizer, self.chat_template)
        ends = {self.tokenizer.eos_token_id, token_id(self.tokenizer, end)}
        rows = [list(takewhile(lambda id: id not in ends, row)) for row in generated[:, prompt_length:].tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [(text.partition(end)[0] if end else text).strip() for text in texts]

    def end_token_ids(self, known: int | list[int] | None = None) -> list[int]:
        """Ids that end an answer, for `generation_config.eos_token_id`: EOS, and the mark of the chat template.

        A mark that is no token of its own, `###` of the published layout, ends in every token that contains it.

        Args:
            known: ids that the language model names already.
        """
        ends = [self.tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or [])]
        if end := answer_end(self.tokenizer, self.chat_template):
            ends.append(token_id(self.tokenizer, end))
            ends += sorted(id for token, id in self.tokenizer.get_vocab().items() if end in token)
        return list(dict.fromkeys(number for number in ends if number is not None))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "point_mask", "point_values", "point_lengths"]


def _texts(messages: list[dict]) -> list[str]:
    """Everything that was typed."""
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]
    return texts


def _cut_inside(text: str, tokens: list[str], seam: str) -> str:
    """`text` with a seam inside each occurrence of a token: tokenized in two pieces, it is not that token."""
    for token in tokens:
        while token in text:  # again for occurrences that overlap
            text = text.replace(token, token[:1] + seam + token[1:])
    return text


def _split_at(text: str, marker: str) -> list[str | None]:
    """`a<point>b` -> `["a", None, "b"]`"""
    parts: list[str | None] = []
    for piece in text.split(marker):
        parts += [piece, None]
    return parts[:-1]
