"""A visitor's objects and conversation, and answers as they grow."""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pointalign.conversation import Conversation, Decoding
from pointalign.data.point_cloud import subsample
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.page.intake import Item

PAUSE = 0.05  # seconds between two replies at least: a fast model writes faster than a browser draws


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    Attributes:
        text: as far as it is settled.
        first: seconds from the question to the first word; None before it.
        seconds: since the question.
        done: whether the answer has ended.
        stopped: whether the visitor ended it.
    """

    text: str
    first: float | None
    seconds: float
    done: bool = False
    stopped: bool = False


class Talk:
    """What the page remembers of a visitor.

    Attributes:
        items: object by slot, 0 or 1; the second, which the first is compared with, may be missing.
        conversation: begins anew whenever an object changes.
        busy: whether an answer is under way.
    """

    def __init__(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor):
        self.model = model
        self.processor = processor
        self.items: dict[int, Item] = {}
        self.conversation = Conversation(model, processor)
        self.busy = False
        self._stop = threading.Event()

    def __deepcopy__(self, _memo: dict) -> "Talk":
        """An empty talk with the same model: gradio copies the page's for every visitor."""
        return Talk(self.model, self.processor)

    def put(self, slot: int, item: Item) -> None:
        """Place an object; without a first object, the second becomes the first."""
        self.items[slot if self.items else 0] = item
        self.clear()

    def remove_second(self) -> None:
        self.items.pop(1, None)
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation about the same objects; an answer under way ends."""
        self.stop()
        self.conversation = Conversation(self.model, self.processor)

    def stop(self) -> None:
        """End the answer under way with the word that it has come to."""
        self._stop.set()

    def answer(self, question: str, num_points: int, decoding: Decoding) -> Iterator[Reply]:
        """Replies that grow up to the answer. They end early if the conversation is cleared meanwhile.

        Args:
            num_points: how many points the model reads of each object.

        Raises: ValueError: there is no object or no question, an answer is under way, or see `Conversation.ask`.
        """
        if self.busy:
            raise ValueError("the last answer is still under way: wait for it, or stop it")
        if not self.items:
            raise ValueError("there is no object to ask about: pick an example or drop a file first")
        if not question.strip():
            raise ValueError("there is no question: type one, or pick a suggestion")
        conversation = self.conversation
        conversation.clouds = [subsample(self.items[slot].points, num_points) for slot in sorted(self.items)]
        self.busy, self._stop = True, threading.Event()
        stop = self._stop
        try:
            for reply in grow(conversation, question.strip(), decoding, stop):
                if self.conversation is not conversation:
                    return
                yield reply
        finally:
            self.busy = False


def grow(
    conversation: Conversation, question: str, decoding: Decoding, stop: threading.Event | None = None
) -> Iterator[Reply]:
    """Ask in a thread, and yield replies as words come, and the answer. An error of the answer is raised here.

    A consumer that ends early ends the answer too.
    """
    stop = stop or threading.Event()
    texts: queue.Queue[str | None] = queue.Queue()
    began = time.perf_counter()
    first = None
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(conversation.ask, question, decoding, texts.put, stop)
        future.add_done_callback(lambda _: texts.put(None))
        try:
            while (text := texts.get()) is not None:
                seconds = time.perf_counter() - began
                first = seconds if first is None else first
                if texts.empty():  # else a longer text, or the end, is there already
                    yield Reply(text, first, seconds)
                    time.sleep(PAUSE)
            answer = future.result()
        finally:
            stopped = stop.is_set()
            stop.set()
    seconds = time.perf_counter() - began
    yield Reply(answer.text, first or seconds, seconds, done=True, stopped=stopped)
