"""A conversation about clouds, its words told as they come: what `pointalign chat` and the page share."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from pointalign.certainty import Answer, generate_answers, may_be_hedged
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

CLOUD_PLACE = -1  # no token's id


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the most probable token each time; above 0 tokens are drawn, and the answer is not hedged.
        seed: of the draw; the same seed gives the same answer.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected 1 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")


class Conversation:
    """Questions and answers about clouds that come before the first question.

    In float32 the language model reads a turn once: its keys and values stay with the conversation, and the next prompt
    goes on behind the tokens that both begin with. The model's weights must not change meanwhile.

    Args:
        generation: further options of `generate`, such as those of `models.serving.compiled_generation`. With any,
            every prompt is read from its beginning.

    Attributes:
        clouds: `[N, 6]` each, xyz and rgb in 0..1, in the order in which they are read.
        turns: questions with their answers so far.
    """

    def __init__(
        self,
        model: PointAlignForConditionalGeneration,
        processor: PointAlignProcessor,
        clouds: Sequence[np.ndarray] = (),
        generation: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.processor = processor
        self.clouds = list(clouds)
        self.generation = dict(generation or {})
        self.turns: list[tuple[str, str]] = []
        self._read: ReadTurns | None = None

    def messages(self, question: str) -> list[dict]:
        """The chat messages so far, and the question."""
        messages: list[dict] = []
        for asked, answer in self.turns:
            messages += [{"role": "user", "content": [{"type": "text", "text": asked}]}]
            messages += [{"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages[0]["content"][:0] = [{"type": "point", "point": cloud} for cloud in self.clouds]
        return messages

    def ask(
        self,
        question: str,
        decoding: Decoding | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """The answer, which becomes part of the conversation unless it is empty.

        Args:
            on_text: is told the answer as far as no later token changes it, each time that it has grown.
            stop: once it is set, the answer ends with the token under way.

        Raises:
            PointCloudError: a cloud that the model cannot read.
            ValueError: the conversation has become longer than the language model reads.
        """
        decoding = decoding or Decoding()
        model, processor = self.model, self.processor
        batch = self._prompt(question)
        self._check_length(batch["input_ids"].shape[1], decoding.max_new_tokens)
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.temperature > 0}
        if decoding.temperature > 0:
            options |= {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        if on_text is not None:
            may_hedge = not options["do_sample"] and model.config.name_threshold > 0
            options["streamer"] = GrowingText(processor, on_text, may_hedge)
        if stop is not None:
            options["stopping_criteria"] = StoppingCriteriaList([Stopped(stop)])
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=options["do_sample"]):
            if options["do_sample"]:
                torch.manual_seed(decoding.seed)
            answer = self._answer(batch, options)
        if answer.text:
            self.turns.append((question, answer.text))
        return answer

    def generate(self, question: str, **options: Any) -> None:
        """Draw an answer that does not become part of the conversation, with these options of `generate`."""
        self.model.generate(**self._prompt(question), **self.generation | {"do_sample": False} | options)

    def _prompt(self, question: str) -> Any:
        batch = self.processor.apply_chat_template(self.messages(question), tokenize=True, add_generation_prompt=True)
        return batch.to(self.model.device)

    def _answer(self, batch: Any, options: dict[str, Any]) -> Answer:
        """The answer to a prompt, read from where it differs from the last turn."""
        read, self._read = self._read, None  # an answer that fails leaves keys and values of unknown tokens
        cache = None if self.generation else croppable_cache(self.model)
        if cache is None:
            (answer,) = generate_answers(self.model, self.processor, batch, **self.generation | options)
            return answer
        tokens = prompt_tokens(batch)
        clouds = {name: batch[name] for name in ("point_values", "point_lengths") if name in batch}
        if read is not None and (length := read.shared(tokens, clouds)):
            cache = read.cache
            cache.crop(length - cache.get_seq_length())
        (answer,) = generate_answers(self.model, self.processor, batch, **options, past_key_values=cache)
        self._read = ReadTurns([*tokens, *answer.tokens][: cache.get_seq_length()], clouds, cache)
        return answer

    def _check_length(self, prompt: int, answer: int) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and prompt + answer > longest:
            raise ValueError(
                f"the conversation has {prompt} tokens and the answer may have {answer}, but the language model reads "
                f"{longest} at most: begin a new conversation, or shorten the question or the answer"
            )


@dataclass(frozen=True)
class ReadTurns:
    """What the language model has read of a conversation.

    Attributes:
        tokens: ids, -1 at the places of clouds.
        clouds: tensors of the processor.
        cache: keys and values of every token.
    """

    tokens: list[int]
    clouds: dict[str, Tensor]
    cache: DynamicCache

    def shared(self, tokens: list[int], clouds: dict[str, Tensor]) -> int:
        """How many tokens a prompt shares with this, short of its last; 0 unless its clouds are among them."""
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        same = clouds.keys() == self.clouds.keys() and all(
            torch.equal(clouds[name], value) for name, value in self.clouds.items()
        )
        return length if same and CLOUD_PLACE not in tokens[length:] else 0


def prompt_tokens(batch: Mapping[str, Tensor]) -> list[int]:
    """Ids of a prompt, with -1 at the places of clouds."""
    return batch["input_ids"][0].masked_fill(batch["point_mask"][0].bool(), CLOUD_PLACE).tolist()


def croppable_cache(model: PointAlignForConditionalGeneration) -> DynamicCache | None:
    """An empty cache that can be cut at any token without changing an answer; None where there is no such cache.

    Beams fill several rows; generation with drafted tokens reads a prompt from its beginning; a sliding window and a
    recurrent state do not return to an earlier token; positions that are scaled by the length of the text change with
    it. Rounding depends on how many tokens are read together, and in 16 bits it decides near ties: the same
    conversation would have another answer.
    """
    generation, text_config = model.generation_config, model.config.get_text_config(decoder=True)
    one_by_one = generation.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    plain = one_by_one and generation.cache_implementation in (None, "dynamic")
    scaling = str(getattr(text_config, "rope_parameters", None))  # of all kinds of layers
    scaled = "dynamic" in scaling or "longrope" in scaling
    if model.dtype != torch.float32 or not plain or generation.use_cache is False or scaled:
        return None
    cache = DynamicCache(config=text_config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


class GrowingText(BaseStreamer):
    """Turns the tokens of an answer into its text, as far as that is settled.

    Args:
        listener: is told the text from its beginning, each time that it has grown.
        may_hedge: hold a name back while `certainty.hedge` may still change how it begins.
    """

    def __init__(self, processor: PointAlignProcessor, listener: Callable[[str], None], may_hedge: bool):
        self.processor = processor
        self.listener = listener
        self.may_hedge = may_hedge
        self._tokens: list[int] | None = None  # None until the prompt, which comes first, has passed
        self._told = ""

    def put(self, value: Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.tolist()
        (text,) = self.processor.answers(torch.tensor([self._tokens]), 0)
        text = settled(text, self.may_hedge)
        if len(text) > len(self._told):
            self._told = text
            self.listener(text)

    def end(self) -> None:
        """The answer itself follows as the result of `Conversation.ask`."""


def settled(text: str, may_hedge: bool) -> str:
    """The part of a growing answer that stays: without the last word, which the next token may continue."""
    if may_hedge and may_be_hedged(text):
        return ""
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1].rstrip()


class Stopped(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """`[B]`, true where generation ends; input_ids `[B, T]`."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
