"""Annotations, and their translation into chat messages.

An annotation file is a JSON list, or JSON lines, of entries `{"object_id": str | int | [...], "conversation_type":
str, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`. The human values hold `<point>` once per object
id; an entry without object ids is text alone; a missing type means simple_description. Source: the data release of
PointLLM (Xu et al., ECCV 2024), extended to several objects. Read as well: ShapeLLM's `point` in the place of
`object_id`, and `messages` of `{"role": "user" | "assistant", "content": str | parts}`, as trl and ms-swift write them.
"""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POINT_MARKER = "<point>"
# Objaverse objects whose colours are corrupt in the released clouds
CORRUPT_IDS = frozenset({"6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"})
_CORRUPT = re.compile("|".join(CORRUPT_IDS))


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file and the entry, counted from 0."""


@dataclass(frozen=True)
class Conversation:
    """An annotated dialogue about an object or several.

    Attributes:
        object_ids: names of the objects, in reading order; none where the dialogue is text alone.
        conversation_type: as in the file.
        turns: pairs (role, text), "user" and "assistant" in turn; the user's texts hold `<point>` once per object id.
    """

    object_ids: tuple[str, ...]
    conversation_type: str
    turns: tuple[tuple[str, str], ...]
    kind: str | None = None


def load_conversations(path: str | Path, types: Collection[str] | None = None) -> list[Conversation]:
    """Reads an annotation file, without the Objaverse objects whose clouds are corrupt.

    Args:
        types: conversation types, or kinds of question, to return; None for all.

    Raises: AnnotationError: not JSON, not a list, an entry that breaks the schema, or no conversation of these types.
    """
    path = Path(path)
    try:
        entries = _read_entries(path.read_bytes())
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not JSON ({error}): save the file as UTF-8") from error
    except RecursionError as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a JSON list of entries, got {type(entries).__name__}")
    conversations = []
    for index, entry in enumerate(entries):
        try:
            conversations.append(_parse_entry(entry))
        except AnnotationError as error:
            raise AnnotationError(f"{path}: entry {index}: {error}") from error
    usable = [c for c in conversations if not _is_corrupt(c.object_ids)]
    selected = [c for c in usable if _is_of(c, types)]
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
        self._encoding = "utf-8"
        self._starts = array("q")
        self.entry_bytes = array("q")  # the length of every entry: what is known of a conversation without parsing it
        self.object_ids: list[tuple[str, ...]] = []
        try:
            with self.path.open("rb") as file:
                self._encoding, _ = _encoding(file.read(4))
            for start, length, entry in _scan(self.path):
                ids = _ids_of_plain_entry(entry, types)
                if ids is None:
                    conversation = _parse_entry(entry)
                    ids = conversation.object_ids if _is_of(conversation, types) else None
                if ids is not None and not _is_corrupt(ids):
                    self._starts.append(start)
                    self.entry_bytes.append(length)
                    self.object_ids.append(ids)
        except (ValueError, OSError, RecursionError):  # `load_conversations` names the fault and its place
            load_conversations(self.path, types)
            raise
        if not self.object_ids:
            load_conversations(self.path, types)

    def keep(self, condition: Callable[[tuple[str, ...]], bool]) -> None:
        """Drop every conversation whose object ids do not meet the condition."""
        self.keep_places([i for i, ids in enumerate(self.object_ids) if condition(ids)])

    def keep_places(self, places: Sequence[int]) -> None:
        """Drop every conversation that is not at one of these places."""
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
            return _parse_entry(json.loads(file.read(self.entry_bytes[index]).decode(self._encoding)))


def _encoding(start: bytes) -> tuple[str, int]:
    """The encoding that the first four bytes of a file tell, and the length of its byte order mark."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if start.startswith(mark):
            return name, len(mark)
    return json.detect_encoding(start), 0


def _read_entries(content: bytes) -> object:
    """The value of a JSON file, or the list of the values of JSON lines."""
    encoding, mark = _encoding(content[:4])
    text = content[mark:].decode(encoding)
    if not text.lstrip().startswith("{"):
        return json.loads(text)
    parse, place, entries = json.JSONDecoder().raw_decode, 0, []
    while True:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        if place == len(text):
            return entries
        entry, place = parse(text, place)
        entries.append(entry)


def _scan(path: Path, block: int = 1 << 22) -> Iterator[tuple[int, int, object]]:
    """Place, length in bytes and value of every entry of a JSON list or of JSON lines, read block by block.

    Raises: ValueError: neither.
    """
    parse = json.JSONDecoder().raw_decode
    with path.open("rb") as file:
        encoding, offset = _encoding(file.read(4))
        file.seek(offset)
        decode = codecs.getincrementaldecoder(encoding)().decode
        width = len(" ".encode(encoding))  # bytes of an ASCII character
        text, at, ended = "", 0, False  # `offset`: the byte that text[at] starts at
        between = ""  # "entry" or "comma": what was read last in a list
        kind = ""  # the first character: "[" of a list, "{" of JSON lines
        while True:
            if not kind or at >= len(text):
                text, at = text[at:], 0
            while at < len(text) and (text[at] in " \t\r\n" or (text[at] == "," and between == "entry")):
                between = "comma" if text[at] == "," else between
                at, offset = at + 1, offset + width
            if at < len(text):
                if not kind:
                    kind = text[at]
                    if kind not in "[{":
                        raise ValueError("neither a list nor JSON lines")
                    if kind == "[":
                        at, offset = at + 1, offset + width
                    continue
                if text[at] == "]" and kind == "[" and between != "comma":
                    if text[at + 1 :].strip() or file.read().strip():
                        raise ValueError("text after the list")
                    return
                if between == "entry" and kind == "[":
                    raise ValueError("entries without a comma between them")
                try:
                    entry, end = parse(text, at)
                except json.JSONDecodeError:
                    if ended:
                        raise
                else:
                    raw = text[at:end]
                    length = len(raw) * width if raw.isascii() else len(raw.encode(encoding))
                    yield offset, length, entry
                    between = "entry" if kind == "[" else ""
                    at, offset = end, offset + length
                    continue
            data = file.read(block)
            if not data and ended:
                if kind == "{" and at >= len(text):
                    return
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
    messages, used = [], 0
    for role, text in conversation.turns:
        marked = text.count(POINT_MARKER) if role == "user" else 0
        messages.append({"role": role, "content": _content(text, clouds[used : used + marked])})
        used += marked
    return messages


def _content(text: str, clouds: Sequence[np.ndarray | str | Path]) -> list[dict]:
    """The items of a message whose text holds as many markers as there are `clouds`."""
    if not len(clouds):
        return [{"type": "text", "text": text}]
    content: list[dict] = []
    pieces = text.split(POINT_MARKER)
    for i, piece in enumerate(pieces):
        if i > 0:
            content.append({"type": "point", "point": clouds[i - 1]})
            piece = piece.lstrip("\r\n")
        if i < len(pieces) - 1:
            piece = piece.rstrip("\r\n")
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def _is_of(conversation: Conversation, types: Collection[str] | None) -> bool:
    return types is None or conversation.conversation_type in types or conversation.kind in types


def _is_corrupt(object_ids: Collection[str]) -> bool:
    """Whether one of the objects, under its id or the path of its file, has a corrupt cloud."""
    return any(map(_CORRUPT.search, object_ids))


_ID_FIELDS = ("object_id", "point", "points")  # of PointLLM, of ShapeLLM, and of lists in the style of ms-swift


def _ids_of_plain_entry(entry, types: Collection[str] | None) -> tuple[str, ...] | None:
    """The object ids of a sound entry like those of the brief captions, else None: quicker than `_parse_entry`."""
    try:
        question, answer = entry["conversations"]
        name, text, reply = entry["object_id"], question["value"], answer["value"]
        plain = (
            question["from"] == "human"
            and answer["from"] == "gpt"
            and isinstance(text, str)
            and text.count(POINT_MARKER) == 1
            and POINT_MARKER not in reply
            and reply.strip()
            and (types is None or entry["conversation_type"] in types)
            and isinstance(entry.get("conversation_type", ""), str)
            and _is_plain(name)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return (name,) if plain else None


def _parse_entry(entry) -> Conversation:
    if not isinstance(entry, dict):
        raise AnnotationError(f"expected an object, got {type(entry).__name__}")
    turn_field = "conversations" if "conversations" in entry else "messages"
    if turn_field not in entry:
        raise AnnotationError(f"field 'conversations' is missing, got {', '.join(entry) or 'no fields'}")
    kind = entry.get("conversation_type", "simple_description")
    if not isinstance(kind, str):
        raise AnnotationError(f"conversation_type must be a string, got {kind!r:.200}")
    turns = entry[turn_field]
    if not isinstance(turns, list):
        raise AnnotationError(
            f"{turn_field} must be a list of human and gpt turns in pairs, got {type(turns).__name__}"
        )
    parsed, ids = _parse_turns(turns)
    if not ids:
        field = next((field for field in _ID_FIELDS if entry.get(field) not in (None, "", [])), "object_id")
        ids = _parse_ids(entry.get(field), field)
    if not ids and any(POINT_MARKER in text for _, text in parsed):
        if "object_id" in entry:
            raise AnnotationError(f"object_id must be a name, or a list of names, got {entry['object_id']!r:.200}")
        raise AnnotationError(f"field 'object_id' is missing, got {', '.join(entry)}")
    _check_markers(parsed, len(ids))
    question_kind = entry.get("kind")
    return Conversation(ids, kind, parsed, question_kind if isinstance(question_kind, str) else None)


def _parse_ids(ids, field: str) -> tuple[str, ...]:
    """Names of objects; whole numbers are names too."""
    if isinstance(ids, str) and ids and _is_plain(ids):
        return (ids,)
    if ids is None or ids == [] or ids == "":
        return ()
    names = [str(i) if type(i) is int else i for i in (ids if isinstance(ids, list) else [ids])]
    if not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise AnnotationError(f"{field} must be a name, or a list of names, without '..' in it; got {names!r:.200}")
    return tuple(names)


_SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _parse_turns(turns: list) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Pairs (role, text), and the object ids that parts of a content name. A system turn opens the first question."""
    parsed: list[tuple[str, str]] = []
    ids: list[str] = []
    system = ""
    for index, turn in enumerate(turns):
        expected = "gpt" if len(parsed) % 2 else "human"
        sender, text = None, ""
        if isinstance(turn, dict):
            sender = turn["from"] if "from" in turn else turn.get("role")
            text = turn["value"] if "value" in turn else turn.get("content")
        if not isinstance(text, str):
            text, named = _parse_content(text)
            ids += named
        if not text.strip():
            raise AnnotationError(
                f"turn {index} must be {{'from': {expected!r}, 'value': non-empty text}}, got {turn!r:.200}"
            )
        role = _SENDERS.get(sender) if isinstance(sender, str) else None
        if role == "system" and index == 0:
            system = text + "\n\n"
            continue
        if role != _SENDERS[expected]:
            raise AnnotationError(f"turn {index} must come from {expected!r}, got {sender!r:.200}")
        parsed.append((role, text))
    if not parsed or len(parsed) % 2:
        raise AnnotationError(f"conversations must be a list of human and gpt turns in pairs, got {len(parsed)}")
    if system:
        parsed[0] = (parsed[0][0], system + parsed[0][1])
    return tuple(parsed), tuple(ids)


def _parse_content(content) -> tuple[str, tuple[str, ...]]:
    """The text of a turn in parts, "" if it is none, and the ids in its parts `{"type": "point", "point": id}`."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return "", ()
    text, ids = "", ()
    for part in content:
        if part.get("type") == "point":
            text += POINT_MARKER
            ids += _parse_ids(next((part[key] for key in (*_ID_FIELDS, "path") if key in part), None), "point")
        elif isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise AnnotationError(f"a part of a content must be of type text or point, got {part!r:.200}")
    return text, ids


def _check_markers(turns: Sequence[tuple[str, str]], num_objects: int) -> None:
    """The user's turns hold a marker for every object, and the answers none."""
    left, first = num_objects, 0
    for index, (_, text) in enumerate(turns):
        count = text.count(POINT_MARKER)
        due = 0 if index % 2 else left
        if count > due:
            reason = "only human turns hold it" if index % 2 else "one per object id"
            raise AnnotationError(f"turn {index} holds {POINT_MARKER} {count} times, expected {due} ({reason})")
        left -= count
        if index == 0:
            first = count
    if left:
        raise AnnotationError(
            f"turn 0 holds {POINT_MARKER} {first} times, expected {first + left} (one per object id, there or in a "
            "later human turn)"
        )


def _is_plain(name: str) -> bool:
    """Whether an object id can name a file in the folder of clouds or a subfolder, and none outside."""
    return bool(name) and name[0] != "/" and "\0" not in name and ".." not in name.replace("\\", "/").split("/")
