"""From files and chat messages to tensors: the feature extractor for clouds and the processor for both.

Which places of a text belong to clouds is tracked as `point_mask`, from the message to the model. A chat template
only ever sees a marker that occurs nowhere in the user's own text, so a typed `<point>` stays plain text, and so does a
typed control token such as `<|im_end|>`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from pointalign.data.point_cloud import PointCloudError, load_point_cloud, normalise, subsample

IGNORED = -100  # label of a token that carries no loss
POINT_MARKER = "<point>"

END_MARK = "###"  # of an answer in the published layout

# For language models without a chat template, the layout that the published weights were trained with: every question
# opens with BOS and stands in [INST] brackets, an answer follows without a space and ends in ###. Of the two spaces one
# ends the question, the other belongs to the bracket.
# Source: the released code of MiniGPT-3D and PointAlign. All stages set `chat_template: True`, which puts the question
# of a sample with one turn into brackets too, not those of dialogues alone. MiniGPT-3D's evaluation asks in another
# layout than it trained (`<s>` spelled out, which is no mark of Phi-2's, in place of BOS, and a second [INST] after the
# cloud); here a model is asked as it was trained.
PLAIN_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}"
    f"{END_MARK}"
    "{% else %}{{ bos_token or '' }}[INST] {{ m['content'] }}  [/INST]{% endif %}{% endfor %}"
)


class PointAlignFeatureExtractor(FeatureExtractionMixin):
    """Clouds of any size become one tensor: subsampled, centred, scaled to the unit sphere, padded to the longest.

    Args:
        num_points: the most points kept of a cloud; fewer are used as they are.
        min_points: the fewest that the point encoder can group.
        up_axis: the vertical axis of the files given by path; clouds leave with y up.
        num_channels: 6, xyz and rgb in 0..1.
    """

    model_input_names = ("point_values", "point_lengths")

    def __init__(
        self, num_points: int = 8192, min_points: int = 32, up_axis: str = "y", num_channels: int = 6, **kwargs
    ):
        super().__init__(**kwargs)
        self.num_points = num_points
        self.min_points = min_points
        self.up_axis = up_axis
        self.num_channels = num_channels

    def prepare(self, cloud: Any) -> np.ndarray:
        """One cloud, a path or `[N, 3 + F]` values, as the model reads it: `[min(N, num_points), num_channels]`."""
        points = load_point_cloud(cloud, up_axis=self.up_axis) if isinstance(cloud, (str, Path)) else cloud
        points = np.asarray(points, dtype=np.float32)
        if points.ndim != 2 or points.shape[1] != self.num_channels:
            raise PointCloudError(
                f"expected a cloud of shape [N, {self.num_channels}] (xyz, rgb), got {list(points.shape)}"
            )
        if not np.isfinite(points).all():
            first = int(np.argwhere(~np.isfinite(points).all(axis=1))[0, 0])
            raise PointCloudError(f"point {first} of the cloud is NaN or infinite: {points[first].tolist()}")
        if self.num_channels == 6 and (points[:, 3:].min(initial=0) < 0 or points[:, 3:].max(initial=0) > 1):
            low, high = points[:, 3:].min(), points[:, 3:].max()
            raise PointCloudError(f"expected colours in 0..1, got {low:g} to {high:g}: divide 8-bit colours by 255")
        if len(points) < self.min_points:
            raise PointCloudError(
                f"the cloud has {len(points)} points, the point encoder needs at least {self.min_points}"
            )
        return normalise(subsample(points, self.num_points))

    def __call__(self, points: Sequence[Any], return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
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
        point_token_id: the id written into those places.
        point_prefix, point_suffix: text around every cloud.
        chat_template: by default the tokenizer's own; without one, the layout of the published training runs:
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
            chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
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

        Every `<point>` counts as a placeholder here; text of users belongs in `apply_chat_template`, where it cannot
        be one.

        Args:
            text: one text or several.
            points: the clouds of all texts in reading order, as paths or `[N, 6]` arrays.

        Raises:
            ValueError: markers and clouds differ in number, or truncation would cut a cloud.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        rows = [self._encode([(part, False) for part in _split(one, POINT_MARKER)]) for one in texts]
        return self._batch(
            rows, [] if points is None else list(points), padding, truncation, max_length, return_tensors, labels=False
        )

    # -- chat messages -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]  # one function of our own in place of the image-keyed one
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
            conversation: one conversation or a batch, in the usual message format.
            add_generation_prompt: end with the opening of an answer.
            tokenize: return tensors; else the rendered text, `<point>` at the clouds' places.
            return_labels: add `labels`: the tokens of the assistant's turns with their end mark, -100 elsewhere.
            truncation, max_length: cut each row at the right.
            read_clouds: add the clouds' tensors; without, features computed earlier take their places.

        Raises:
            ValueError: a cut would go through a cloud, or leave nothing to learn from.
        """
        batched = bool(conversation) and isinstance(conversation[0], list)
        conversations: list[list[dict]] = conversation if batched else [conversation]  # type: ignore[assignment]
        template = chat_template or self.chat_template
        rendered = [self._render(one, template, add_generation_prompt, kwargs) for one in conversations]
        if not tokenize:
            texts = ["".join(POINT_MARKER if text is None else text for text, _ in parts) for parts, _ in rendered]
            return texts if batched else texts[0]
        rows = [self._encode(parts) for parts, _ in rendered]
        clouds = [cloud for _, found in rendered for cloud in found]
        batch = self._batch(rows, clouds, padding, truncation, max_length, return_tensors, return_labels, read_clouds)
        return batch if return_dict else batch["input_ids"]

    def _render(
        self, messages: list[dict], template: str, add_generation_prompt: bool, kwargs: dict
    ) -> tuple[list[tuple[str | None, bool]], list[Any]]:
        """Parts `(text, is_answer)` with `None` in the place of each cloud, and the clouds."""
        assert self.tokenizer is not None
        typed = "".join(_texts(messages))
        marker, seam = _unused(POINT_MARKER, typed), _unused("<seam>", typed)
        controls = [token for token in self.tokenizer.all_special_tokens if token in typed]
        plain, clouds = [], []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                pieces = []
                for item in content:
                    if item["type"] == "point":
                        clouds.append(item["path"] if "path" in item else item["point"])
                        pieces.append(f"{self.point_prefix}{marker}{self.point_suffix}")
                    elif item["type"] == "text":
                        pieces.append(item["text"])
                    else:
                        raise ValueError(f"content of type {item['type']!r}: this model reads 'text' and 'point'")
                content = "".join(pieces)
            for token in controls:  # tokenized in two pieces, it is none
                content = content.replace(token, token[:1] + seam + token[1:])
            plain.append(message | {"content": content})

        def render(upto: int, prompt: bool) -> str:
            return self.tokenizer.apply_chat_template(
                plain[:upto], chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
            )

        whole = render(len(plain), add_generation_prompt)
        parts: list[tuple[str, bool]] = []
        done = 0
        for turn, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            before, after = render(turn, True), render(turn + 1, False)
            answer = after[len(before) :].rstrip()
            if not whole.startswith(before + answer):
                raise ValueError("the chat template rewrites earlier turns, so its answers cannot be told apart")
            parts += [(whole[done : len(before)], False), (answer, True)]
            done = len(before) + len(answer)
        parts.append((whole[done:], False))
        split: list[tuple[str | None, bool]] = []
        for text, is_answer in parts:
            for piece in _split(text, marker):
                split += [(one, is_answer) for one in ([None] if piece is None else piece.split(seam))]
        if sum(piece is None for piece, _ in split) != len(clouds):
            raise ValueError("the chat template dropped or repeated a point cloud")
        return split, clouds

    def _encode(self, parts: Sequence[tuple[str | None, bool]]) -> dict[str, list]:
        """Token ids, point mask and labels of one row, unpadded."""
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
        assert self.tokenizer is not None and self.feature_extractor is not None
        spans = sum(sum(row["point_mask"]) for row in rows) // self.num_query_tokens
        if spans != len(clouds):
            raise ValueError(f"the text has {spans} places for clouds, {len(clouds)} clouds were given")
        if truncation and max_length is not None:
            for number, row in enumerate(rows):
                self._truncate(row, max_length, number, labels)
        names = ["input_ids", "point_mask"] + (["labels"] if labels else [])
        filler = {"input_ids": self.tokenizer.pad_token_id or 0, "point_mask": False, "labels": IGNORED}
        longest = max(len(row["input_ids"]) for row in rows) if padding else None
        left = not labels  # text that an answer will be appended to
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

    def _truncate(self, row: dict[str, list], max_length: int, number: int, labels: bool) -> None:
        if any(row["point_mask"][max_length:]):
            raise ValueError(
                f"row {number} has {len(row['input_ids'])} tokens; cutting it at max_length={max_length} would cut "
                f"through a point cloud: allow more tokens or shorten the text before the cloud"
            )
        if labels and all(label == IGNORED for label in row["labels"][:max_length]):
            raise ValueError(
                f"row {number} has {len(row['input_ids'])} tokens; cutting it at max_length={max_length} leaves no "
                f"answer to learn from"
            )
        for name in row:
            row[name] = row[name][:max_length]

    # -- back to text ------------------------------------------------------------------------------------------------

    def answers(self, generated: Tensor, prompt_length: int) -> list[str]:
        """The new text of `generate`'s output `[B, T]`, without special tokens and whatever follows an end mark."""
        texts = self.tokenizer.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
        if self.ends_in_mark:
            texts = [text.partition(END_MARK)[0] for text in texts]
        return [text.strip() for text in texts]

    @property
    def ends_in_mark(self) -> bool:
        return self.chat_template == PLAIN_CHAT_TEMPLATE

    def end_token_ids(self) -> list[int]:
        """Ids that end an answer, for `generation_config.eos_token_id`: EOS, and tokens that hold the end mark."""
        assert self.tokenizer is not None
        ends = [self.tokenizer.eos_token_id]
        if self.ends_in_mark:
            ends += sorted(id for token, id in self.tokenizer.get_vocab().items() if END_MARK in token)
        return [one for one in ends if one is not None]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "point_mask", "point_values", "point_lengths"]


def _texts(messages: list[dict]) -> list[str]:
    found = []
    for message in messages:
        content = message["content"]
        found += [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]
    return found


def _unused(marker: str, text: str) -> str:
    """`marker`, bracketed until it does not occur in `text`."""
    while marker in text:
        marker = f"<{marker}>"
    return marker


def _split(text: str, marker: str) -> list[str | None]:
    """`a<point>b` -> `["a", None, "b"]`"""
    parts: list[str | None] = []
    for piece in text.split(marker):
        parts += [piece, None]
    return parts[:-1]
