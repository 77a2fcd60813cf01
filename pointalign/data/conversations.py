"""Annotations in the PointLLM schema, and their translation into chat messages.

An annotation file is a JSON list of entries `{"object_id": str | [str, ...], "conversation_type": str,
"conversations": [{"from": "human" | "gpt", "value": str}, ...]}`. The first human value holds `<point>` once per object
id; a missing type means simple_description. Source: the data release of PointLLM (Xu et al., ECCV 2024), extended to
several objects.
"""

import codecs
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POINT_MARKER = "<point>"
# Objaverse objects whose colours are corrupt in the released clouds
CORRUPT_IDS = frozenset({"6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"})
_ROLES = {"human": "user", "gpt": "assistant"}


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file and the entry, counted from 0."""


@dataclass(frozen=True)
class Conversation:
    """An annotated dialogue about an object or several.

    Attributes:
        object_ids: names of the objects.
        conversation_type: as in the file.
        turns: pairs (role, text), "user" and "assistant" in turn; the first text holds `<point>` once per object id.
        kind: of question, such as `colour`, where the file says it.
    """

    object_ids: tuple[str, ...]
    conversation_type: str
    turns: tuple[tuple[str, str], ...]
    kind: str | None = None


def load_conversations(path: str | Path, types: Collection[str] | None = None) -> list[Conversation]:
    """Reads an annotation file, without the Objaverse objects whose clouds are corrupt.

    Args:
        types: conversation types to return; None for all.

    Raises: AnnotationError: not JSON, not a list, an entry that breaks the schema, or no conversation of these types.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a JSON list of entries, got {type(entries).__name__}")
    conversations = []
    for index, entry in enumerate(entries):
        try:
            conversations.append(_parse_entry(entry))
        except AnnotationError as error:
            raise AnnotationError(f"{path}: entry {index}: {error}") from error
    usable = [c for c in conversations if CORRUPT_IDS.isdisjoint(c.object_ids)]
    selected = [c for c in usable if types is None or c.conversation_type in types]
    if not selected:
        present = ", ".join(sorted({c.conversation_type for c in conversations})) or "no entries"
        expected = "any type" if types is None else ", ".join(types)
        raise AnnotationError(f"{path}: no conversation of {expected}; the file holds {present}")
    return selected


class IndexedConversations(Sequence[Conversation]):
    """The conversations of `load_conversations`, parsed at access: every entry is checked once, then read again.

    Only the entries' places in the file and their object ids stay in memory, about 120 bytes per entry, which worker
    processes share. Arguments and errors are those of `load_conversations`.
    """

    def __init__(self, path: str | Path, types: Collection[str] | None = None):
        self.path = Path(path)
        self._starts = array("q")
        self.entry_bytes = array("q")  # the length of every entry: what is known of a conversation without parsing it
        self.object_ids: list[tuple[str, ...]] = []
        try:
            for start, length, entry in _scan(self.path):
                conversation = _parse_entry(entry)
                of_type = types is None or conversation.conversation_type in types
                if of_type and CORRUPT_IDS.isdisjoint(conversation.object_ids):
                    self._starts.append(start)
                    self.entry_bytes.append(length)
                    self.object_ids.append(conversation.object_ids)
        except (ValueError, OSError, RecursionError):  # `load_conversations` names the fault and its place
            load_conversations(self.path, types)
            raise
        if not self.object_ids:
            load_conversations(self.path, types)

    def keep(self, condition: Callable[[tuple[str, ...]], bool]) -> None:
        """Drop every conversation whose object ids do not meet the condition."""
        places = [i for i, ids in enumerate(self.object_ids) if condition(ids)]
        self._starts = array("q", [self._starts[i] for i in places])
        self.entry_bytes = array("q", [self.entry_bytes[i] for i in places])
        self.object_ids = [self.object_ids[i] for i in places]

    def __len__(self) -> int:
        return len(self.object_ids)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return _parse_entry(json.loads(file.read(self.entry_bytes[index])))


def _scan(path: Path, block: int = 1 << 22) -> Iterator[tuple[int, int, object]]:
    """Place, length in bytes and value of every entry of a JSON list, read block by block.

    Raises: ValueError: not a JSON list in UTF-8.
    """
    parse = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with path.open("rb") as file:
        text, at, offset, ended = "", 0, 0, False  # `offset`: the byte that text[at] starts at
        opened = False
        while True:
            if not opened or at >= len(text):
                text, at = text[at:], 0
            while at < len(text) and text[at] in " \t\r\n,":
                at, offset = at + 1, offset + 1
            if at < len(text):
                if not opened:
                    if text[at] != "[":
                        raise ValueError("not a list")
                    opened, at, offset = True, at + 1, offset + 1
                    continue
                if text[at] == "]":
                    if text[at + 1 :].strip() or file.read().strip():
                        raise ValueError("text after the list")
                    return
                try:
                    entry, end = parse(text, at)
                except json.JSONDecodeError:
                    if ended:
                        raise
                else:
                    raw = text[at:end]
                    length = len(raw) if raw.isascii() else len(raw.encode())
                    yield offset, length, entry
                    at, offset = end, offset + length
                    continue
            data = file.read(block)
            if not data and ended:
                raise ValueError("the list does not end")
            ended = not data
            text, at = text[at:] + decode(data, final=ended), 0


def to_messages(conversation: Conversation, clouds: Sequence[np.ndarray | str | Path]) -> list[dict]:
    """Chat messages in the style of transformers: each `<point>` becomes an item `{"type": "point", "point": cloud}`.

    Newlines next to a marker are dropped: the chat template decides where a cloud stands.

    Args:
        clouds: for each object id an array or a path, which goes into its item unchanged.

    Raises: ValueError: clouds and object ids differ in number.
    """
    if len(clouds) != len(conversation.object_ids):
        raise ValueError(f"expected a cloud for each of {len(conversation.object_ids)} object ids, got {len(clouds)}")
    (role, first), *rest = conversation.turns
    texts = first.split(POINT_MARKER)
    content: list[dict] = []
    for i, text in enumerate(texts):
        if i > 0:
            content.append({"type": "point", "point": clouds[i - 1]})
            text = text.lstrip("\r\n")
        if i < len(texts) - 1:
            text = text.rstrip("\r\n")
        if text:
            content.append({"type": "text", "text": text})
    messages = [{"role": role, "content": content}]
    return messages + [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in rest]


def _parse_entry(entry) -> Conversation:
    if not isinstance(entry, dict):
        raise AnnotationError(f"expected an object, got {type(entry).__name__}")
    for field in ("object_id", "conversations"):
        if field not in entry:
            raise AnnotationError(f"field {field!r} is missing, got {', '.join(entry) or 'no fields'}")
    ids = entry["object_id"]
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) and _is_plain(i) for i in ids):
        raise AnnotationError(f"object_id must be a name, or a list of names, without '..' in it; got {ids!r:.200}")
    kind = entry.get("conversation_type", "simple_description")
    if not isinstance(kind, str):
        raise AnnotationError(f"conversation_type must be a string, got {kind!r:.200}")
    turns = entry["conversations"]
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        count = len(turns) if isinstance(turns, list) else type(turns).__name__
        raise AnnotationError(f"conversations must be a list of human and gpt turns in pairs, got {count}")
    question_kind = entry.get("kind")
    return Conversation(
        tuple(ids),
        kind,
        tuple(_parse_turn(i, turn, len(ids)) for i, turn in enumerate(turns)),
        question_kind if isinstance(question_kind, str) else None,
    )


def _parse_turn(index: int, turn, num_objects: int) -> tuple[str, str]:
    expected = "gpt" if index % 2 else "human"
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not turn["value"].strip():
        raise AnnotationError(
            f"turn {index} must be {{'from': {expected!r}, 'value': non-empty text}}, got {turn!r:.200}"
        )
    if turn.get("from") != expected:
        raise AnnotationError(f"turn {index} must come from {expected!r}, got {turn.get('from')!r:.200}")
    markers, due = turn["value"].count(POINT_MARKER), 0 if index else num_objects
    if markers != due:
        reason = "only the first human turn holds it" if index else "one per object id"
        raise AnnotationError(f"turn {index} holds {POINT_MARKER} {markers} times, expected {due} ({reason})")
    return _ROLES[expected], turn["value"]


def _is_plain(name: str) -> bool:
    """Whether an object id can name a file in the folder of clouds or a subfolder, and none outside."""
    return bool(name) and name[0] != "/" and "\0" not in name and ".." not in name.replace("\\", "/").split("/")
