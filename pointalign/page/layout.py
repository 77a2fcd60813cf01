"""The page itself: its parts, and what happens when a visitor touches them. gradio draws it and carries the events."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pointalign.conversation import Decoding
from pointalign.data.point_cloud import FORMATS, UP_AXES, subsample
from pointalign.embedded.questions import COLOUR, LONGEST, NAME, OFFERED, SAME_KIND, TALLER_OF_TWO
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.page import insight, views
from pointalign.page.examples import thumbnail
from pointalign.page.intake import MAX_MEGABYTES, Item, read_upload, short
from pointalign.page.talk import Reply, Talk

CLOUD, GAZE, LAYERS = "Object", "Where it looked", "What each layer still knows"
ABOUT_ONE = (NAME, COLOUR, OFFERED["taller_than_wide"][0], LONGEST, "Is it slender?")
ABOUT_TWO = (SAME_KIND, TALLER_OF_TWO, NAME)
ALL_QUERIES = "all queries, averaged"
FAILURES = (ValueError, RuntimeError, OSError, MemoryError)  # what a file, a question or a full memory can cause
MODEL_QUEUE = {"concurrency_limit": 1, "concurrency_id": "model"}
CSS = Path(__file__).with_name("page.css")


class Page:
    """The page of a model.

    Args:
        name: of the model, for the heading.
        examples: objects to pick; the first is there when the page opens.
    """

    def __init__(
        self,
        model: PointAlignForConditionalGeneration,
        processor: PointAlignProcessor,
        examples: list[Item],
        name: str,
    ):
        self.model, self.processor, self.examples, self.name = model, processor, examples, name

    # -- parts ---------------------------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="pointalign", analytics_enabled=False) as blocks:
            self.talk = gr.State(Talk(self.model, self.processor))
            gr.HTML(
                f"<h1>Ask about a 3D object</h1><p>Pick an object or drop a file, then ask. "
                f"Answers come from <code>{escape(self.name)}</code> on this computer.</p>",
                elem_id="heading",
            )
            with gr.Row(elem_id="columns"):
                with gr.Column(min_width=320, elem_id="objects"):
                    self._add_objects()
                with gr.Column(min_width=320, elem_id="conversation"):
                    self._add_conversation()
            self._connect(blocks)
        return blocks

    def _add_objects(self) -> None:
        self.slot = gr.Radio(
            _slots({}), value=0, label="Object", show_label=False, elem_id="slot", elem_classes="segments"
        )
        self.view = gr.Radio(
            [CLOUD, GAZE, LAYERS], value=CLOUD, label="View", show_label=False, elem_classes="segments"
        )
        self.plot = gr.Plot(show_label=False, label="View of the object", elem_id="view")
        self.camera = gr.Radio(
            list(views.CAMERAS), value=views.CORNER, label="Seen from", show_label=False, elem_classes="segments small",
        )  # fmt: skip
        self.query = gr.Dropdown(
            [(ALL_QUERIES, 0), *((f"query {n}", n) for n in range(1, self.model.config.num_query_tokens + 1))],
            value=0, label="Attention of", visible=False,
        )  # fmt: skip
        self.caption = gr.HTML(elem_id="caption")
        self.gallery = gr.Gallery(
            [(thumbnail(item), item.name) for item in self.examples],
            label="Objects that no training has seen", columns=6, height="auto", allow_preview=False,
            elem_id="examples", object_fit="cover", visible=bool(self.examples), interactive=False, buttons=[],
        )  # fmt: skip
        kinds = " ".join(FORMATS[:5])
        gr.HTML(f"<p>A file of your own: {kinds} …, up to {MAX_MEGABYTES} MB</p>", elem_id="kinds")
        with gr.Row(elem_id="own"):
            self.file = gr.File(
                label="A file of your own", show_label=False, height=96, type="filepath", elem_id="upload", scale=3,
            )  # fmt: skip
            self.up_axis = gr.Dropdown(
                list(UP_AXES), value=self.processor.feature_extractor.up_axis, label="Its up axis", scale=1,
                min_width=100,
            )  # fmt: skip
        self.remove = gr.Button("Remove the second object", size="sm", visible=False)

    def _add_conversation(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation", show_label=False, height="clamp(280px, 52vh, 520px)", render_markdown=False,
            elem_id="chat", placeholder="Ask a question, or pick a suggestion below.", buttons=[],
        )  # fmt: skip
        self.notice = gr.HTML(elem_id="notice")
        with gr.Row(elem_id="suggestions"):
            self.suggestions = [gr.Button(text, size="sm", min_width=40) for text in ABOUT_ONE]
        with gr.Row(elem_id="ask"):
            self.question = gr.Textbox(
                label="Question", show_label=False, placeholder="What do you want to know?", max_length=500, lines=1,
                scale=5, min_width=160, autofocus=True,
            )  # fmt: skip
            self.send = gr.Button("Ask", variant="primary", min_width=80)
            self.stop = gr.Button("Stop", variant="stop", min_width=80, visible=False)
        self.clear = gr.Button("Clear the conversation", size="sm", elem_id="clear")
        with gr.Accordion("Settings", open=False):
            extractor = self.processor.feature_extractor
            self.points = gr.Slider(
                extractor.min_points, extractor.num_points, extractor.num_points, step=1,
                label="Points the model reads",
            )  # fmt: skip
            self.temperature = gr.Slider(
                0, 1.5, 0, step=0.1, label="Temperature", info="0: the most probable words; above, words are drawn"
            )
            self.length = gr.Slider(8, 256, 64, step=8, label="Longest answer, tokens")
            self.seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed of the draw")

    def _connect(self, blocks: gr.Blocks) -> None:
        shown = [self.slot, self.view, self.camera, self.query, self.points]
        seen = [self.plot, self.caption, self.query, self.camera]
        changed = [self.slot, self.chat, self.notice, self.remove, *self.suggestions, *seen]
        talked = [self.chat, self.question, self.notice, self.send, self.stop]
        turning: dict = {"show_progress_on": self.plot, **MODEL_QUEUE}
        blocks.load(self.open, [self.talk, *shown], changed, **turning)
        # of quick clicks the last one counts; by default gradio drops those that come while the first is under way
        self.gallery.select(self.pick, [self.talk, *shown], changed, trigger_mode="multiple", **turning)
        self.file.upload(self.take, [self.talk, self.file, self.up_axis, *shown], [*changed, self.file], **turning)
        self.remove.click(self.remove_second, [self.talk, *shown], changed, **turning)
        for part in (self.slot, self.view, self.camera, self.query):
            part.input(self.look, [self.talk, *shown], [*seen, self.notice], **turning)
        self.points.release(self.look, [self.talk, *shown], [*seen, self.notice], **turning)
        drawing = [self.points, self.temperature, self.length, self.seed]
        asking = {"outputs": talked, "show_progress": "hidden", **MODEL_QUEUE}
        gr.on([self.send.click, self.question.submit], self.answer, [self.talk, self.question, *drawing], **asking)
        for button in self.suggestions:
            button.click(self.answer, [self.talk, button, *drawing], **asking)
        self.stop.click(lambda talk: talk.stop(), self.talk, None, queue=False)
        self.clear.click(self.forget, self.talk, talked, queue=False)

    # -- what happens --------------------------------------------------------------------------------------------------

    def open(self, talk: Talk, *shown: Any) -> dict:
        """A new visitor."""
        if self.examples:
            talk.put(0, self.examples[0])
        return self._changed(talk, *shown)

    def pick(
        self, talk: Talk, slot: int, view: str, camera: str, query: int, points: int, event: gr.SelectData
    ) -> dict:
        """An example takes the chosen slot."""
        talk.put(slot, self.examples[event.index])
        return self._changed(talk, slot, view, camera, query, points)

    def take(self, talk: Talk, path: str | None, up_axis: str, slot: int, *shown: Any) -> dict:
        """An uploaded file takes the chosen slot."""
        if path is None:
            return {self.file: None}
        try:
            talk.put(slot, read_upload(path, self.processor.feature_extractor, up_axis))
        except FAILURES as error:
            return {self.file: None, self.notice: _alert(error)}
        return {self.file: None} | self._changed(talk, slot, *shown)

    def remove_second(self, talk: Talk, _slot: int, *shown: Any) -> dict:
        talk.remove_second()
        return self._changed(talk, 0, *shown)

    def look(self, talk: Talk, slot: int, view: str, camera: str, query: int, points: int) -> dict:
        """What is to be seen of the object in the chosen slot."""
        item = talk.items.get(slot)
        result: dict = {
            self.query: gr.update(visible=item is not None and view == GAZE),
            self.camera: gr.update(visible=item is not None and view != LAYERS),
            self.notice: "",
        }
        if item is None:
            hint = "Pick an object below or drop a file: it becomes the second object, to compare with the first."
            return result | {self.plot: None, self.caption: f"<p>{hint}</p>"}
        try:
            figure, text = self._picture(item, view, camera, query, int(points))
        except FAILURES as error:
            return {self.notice: _alert(error)}
        return result | {self.plot: figure, self.caption: f"<p>{text}</p>"}

    def _picture(self, item: Item, view: str, camera: str, query: int, num_points: int) -> tuple[Any, str]:
        if view == LAYERS:
            similarity = insight.layer_similarity(self.model, self.processor, item.points, num_points)
            return views.layer_figure(similarity), (
                "How alike the object's point tokens stay, layer by layer, to what the Q-Former said about it: linear "
                "CKA, 1 where the same tokens are alike in both. Where the line falls, the geometry fades."
            )
        points = subsample(item.points, views.MAX_SHOWN)
        if view == GAZE:
            chosen = query - 1 if query else None
            gaze = insight.gaze(self.model, self.processor, item.points, num_points, points, chosen)
            return views.attention_figure(points, gaze.values, camera), (
                f"Cross-attention of the Q-Former over {gaze.patches} patches of the cloud, the mean over its heads "
                f"and layers; every point has the colour of its nearest patch."
            )
        count = len(item.points)
        notes = "; ".join([f"{count:,} points, of which the model reads {min(num_points, count):,}", *item.notes])
        return views.cloud_figure(points, camera), f"<strong>{escape(item.name)}</strong>: {escape(short(notes))}"

    def _changed(self, talk: Talk, slot: int, *shown: Any) -> dict:
        """The page after an object changed."""
        slot = slot if talk.items else 0
        texts = ABOUT_TWO if len(talk.items) > 1 else ABOUT_ONE
        result: dict = {
            self.slot: gr.update(choices=_slots(talk.items), value=slot),
            self.chat: [],
            self.remove: gr.update(visible=1 in talk.items),
        }
        for place, button in enumerate(self.suggestions):
            shown_text = {"value": texts[place]} if place < len(texts) else {}
            result[button] = gr.update(visible=bool(shown_text), **shown_text)
        return result | self.look(talk, slot, *shown)

    def answer(
        self, talk: Talk, question: str, points: int, temperature: float, length: int, seed: int | None
    ) -> Iterator[dict]:
        """The conversation, word by word."""
        earlier = _messages(talk.conversation.turns)
        waiting = {self.send: gr.update(visible=False), self.stop: gr.update(visible=True)}
        ready = {self.send: gr.update(visible=True), self.stop: gr.update(visible=False)}
        busy = talk.busy
        try:
            decoding = Decoding(int(length), float(temperature), int(seed or 0))
            replies = talk.answer(question, int(points), decoding)
            yield {self.chat: [*earlier, *_messages([(question, "…")])], self.question: "", self.notice: ""} | waiting
            for reply in replies:
                yield {self.chat: [*earlier, *_messages([(question, reply.text)])], self.notice: _timing(reply)}
        except FAILURES as error:
            yield {self.chat: earlier, self.question: question, self.notice: _alert(error)}
        if not busy:
            yield ready

    def forget(self, talk: Talk) -> dict:
        talk.clear()
        return {self.chat: [], self.notice: "", self.send: gr.update(visible=True), self.stop: gr.update(visible=False)}


def _slots(items: dict[int, Item]) -> list[tuple[str, int]]:
    names = {slot: short(item.name)[:40] for slot, item in items.items()}
    return [(f"1 · {names.get(0, 'an object')}", 0), (f"2 · {names.get(1, 'compare with …')}", 1)]


def _messages(turns: list[tuple[str, str]]) -> list[dict]:
    """gradio's chat messages; it shows their text as HTML, even without Markdown."""
    pairs = [pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": escape(text, quote=False)} for role, text in pairs]


def _alert(error: BaseException) -> str:
    return f'<p class="alert" role="alert">{escape(short(str(error)))}</p>'


def _timing(reply: Reply) -> str:
    if not reply.done:
        return ""
    end = "stopped after" if reply.stopped else "answer after"
    return f'<p role="status">first word after {reply.first:.1f} s, {end} {reply.seconds:.1f} s</p>'
