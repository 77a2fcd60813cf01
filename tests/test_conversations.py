"""PointLLM annotations: what is read, what is refused and how, and the chat messages made of them."""

import json

import numpy as np
import pytest

from pointalign.data.conversations import (
    CORRUPT_IDS,
    AnnotationError,
    Conversation,
    IndexedConversations,
    load_conversations,
    to_messages,
)
from pointalign.data.dataset import find_cloud
from pointalign.data.point_cloud import PointCloudError


def turns(*texts):
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def entry(object_id="a", texts=("<point>\nWhat is this?", "A chair."), **fields):
    return {"object_id": object_id, "conversations": turns(*texts), **fields}


def annotation(tmp_path, entries):
    path = tmp_path / "annotation.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_entries_are_read(tmp_path):
    multi = ("<point>\nWhat is it?", "A lamp.", "Which colour?", "Red.")
    entries = [
        entry(),
        entry("b", multi, conversation_type="multi_round"),
        entry(["a", "b"], ("Compare <point> and <point>.", "Both are lamps."), conversation_type="single_round"),
    ]
    first, second, third = load_conversations(annotation(tmp_path, entries))
    assert first == Conversation(
        ("a",), "simple_description", (("user", "<point>\nWhat is this?"), ("assistant", "A chair."))
    )
    assert second.conversation_type == "multi_round"
    assert second.turns == tuple(zip(("user", "assistant") * 2, multi, strict=True))
    assert third.object_ids == ("a", "b")


def test_types_and_corrupt_ids_are_filtered(tmp_path):
    corrupt = sorted(CORRUPT_IDS)
    assert len(corrupt) == 2
    pair = entry(["a", corrupt[1]], ("<point><point> Compare.", "They differ."))
    entries = [entry(), entry("b", conversation_type="single_round"), entry(corrupt[0]), pair]
    path = annotation(tmp_path, entries)
    assert [c.object_ids for c in load_conversations(path)] == [("a",), ("b",)]
    assert [c.object_ids for c in load_conversations(path, ["single_round"])] == [("b",)]
    with pytest.raises(AnnotationError, match="no conversation of detailed_description; the file holds simple_desc"):
        load_conversations(path, ["detailed_description"])


def test_files_that_hold_no_list(tmp_path):
    with pytest.raises(AnnotationError, match="no such annotation file"):
        load_conversations(tmp_path / "gone.json")
    with pytest.raises(AnnotationError, match="not JSON, line 2 column 4"):
        load_conversations(annotation(tmp_path, "[\n1, }"))
    with pytest.raises(AnnotationError, match="expected a JSON list of entries, got str"):
        load_conversations(annotation(tmp_path, '"text"'))
    with pytest.raises(AnnotationError, match="the file holds no entries"):
        load_conversations(annotation(tmp_path, []))
    for raw in (b"", b"\xff\xfe\x00[", b"\x80\x81", b"[" * 100_000):
        (tmp_path / "raw.json").write_bytes(raw)
        with pytest.raises(AnnotationError, match=r"raw\.json: not JSON"):
            load_conversations(tmp_path / "raw.json")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "expected an object, got str"),
        ({"conversations": turns("<point>", "b")}, "field 'object_id' is missing, got conversations"),
        ({"object_id": "a"}, "field 'conversations' is missing"),
        (entry(7.5), "object_id must be a name"),
        (entry(True), "object_id must be a name"),
        (entry([]), "object_id must be a name"),
        (entry(""), "object_id must be a name"),
        (entry("../secret"), r"without '..' in it; got \['../secret'\]"),
        (entry("/etc/secret"), "object_id must be a name"),
        (entry(conversation_type=3), "conversation_type must be a string"),
        (entry(texts=()), "human and gpt turns in pairs, got 0"),
        (entry(texts=("<point> a", "b", "c")), "in pairs, got 3"),
        ({"object_id": "a", "conversations": "hello"}, "in pairs, got str"),
        ({"object_id": "a", "conversations": [1, 2]}, "turn 0 must be .* non-empty text"),
        (entry(texts=("<point> a", "  ")), "turn 1 must be .* non-empty text"),
        (
            {"object_id": "a", "conversations": turns("<point> a", "b")[::-1]},
            "turn 0 must come from 'human', got 'gpt'",
        ),
        ({"object_id": "a", "conversations": turns("<point> a")[:1] * 2}, "turn 1 must come from 'gpt', got 'human'"),
        (entry(texts=("What is this?", "b")), "turn 0 holds <point> 0 times, expected 1"),
        (entry(texts=("<point><point>", "b")), "turn 0 holds <point> 2 times, expected 1"),
        (entry(["a", "b"], ("<point>", "b")), "turn 0 holds <point> 1 times, expected 2"),
        (entry(texts=("<point>", "b <point>")), "turn 1 holds <point> 1 times, expected 0 .only human turns"),
        (entry(texts=("<point>", "b", "<point>", "c")), "turn 2 holds <point> 1 times, expected 0"),
        (entry(["a", "b"], ("Hi", "b", "<point>", "c")), "turn 0 holds <point> 0 times, expected 1 .*later human turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type text or point"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 0 must come from 'human', got 'tool'"),
    ],
)
def test_bad_entries_are_named(tmp_path, bad, message):
    with pytest.raises(AnnotationError, match=f"annotation.json: entry 1: .*{message}"):
        load_conversations(annotation(tmp_path, [entry(), bad]))


def test_messages_of_one_cloud():
    cloud = np.zeros((4, 6), np.float32)
    question = "<point>\nWhat\nis this?\n"
    conversation = Conversation(("a",), "x", (("user", question), ("assistant", "A chair."), ("user", "Its colour?")))
    messages = to_messages(conversation, [cloud])
    assert messages == [
        {
            "role": "user",
            "content": [{"type": "point", "point": cloud}, {"type": "text", "text": "What\nis this?\n"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A chair."}]},
        {"role": "user", "content": [{"type": "text", "text": "Its colour?"}]},
    ]
    assert messages[0]["content"][0]["point"] is cloud


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Compare <point> and <point>.", ["Compare ", 0, " and ", 1, "."]),
        ("<point>\n<point>\nCompare.", [0, 1, "Compare."]),
        ("Compare:\n<point><point>", ["Compare:", 0, 1]),
    ],
)
def test_several_clouds_stand_in_place(text, expected):
    conversation = Conversation(("a", "b"), "x", (("user", text), ("assistant", "ok")))
    content = to_messages(conversation, ["a.npy", "b.npy"])[0]["content"]
    clouds = ["a.npy", "b.npy"]
    assert content == [
        {"type": "text", "text": e} if isinstance(e, str) else {"type": "point", "point": clouds[e]} for e in expected
    ]


def test_number_of_clouds_must_match():
    conversation = Conversation(("a", "b"), "x", (("user", "<point><point>"), ("assistant", "ok")))
    with pytest.raises(ValueError, match="expected a cloud for each of 2 object ids, got 1"):
        to_messages(conversation, ["a.npy"])


# Files as other tools write them


def both(path, types=None):
    """The conversations of a file, read at once and by index."""
    listed, indexed = load_conversations(path, types), IndexedConversations(path, types)
    assert list(indexed) == listed and indexed.object_ids == [c.object_ids for c in listed]
    return listed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("lines", [False, True])
def test_encodings_and_json_lines(tmp_path, encoding, lines):
    entries = [entry(name, ("<point>\nWas ist das?", f"Ein Stuhl aus Holz, grün 椅子 🪑 {name}.")) for name in "abc"]
    texts = [json.dumps(e, ensure_ascii=False) for e in entries]
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\r\n".join(texts) + "\n\n" if lines else f"[{', '.join(texts)}]").encode(encoding))
    assert [c.turns[1][1][-2:] for c in both(path)] == ["a.", "b.", "c."]
    assert both(path)[0].turns[1][1].startswith("Ein Stuhl aus Holz, grün 椅子 🪑")


def test_a_bad_line_is_named(tmp_path):
    path = annotation(tmp_path, json.dumps(entry()) + "\n" + json.dumps(entry("b"))[:-1] + "\n")
    for read in (load_conversations, IndexedConversations):
        with pytest.raises(AnnotationError, match="not JSON, line 3 column 1"):
            read(path)
    path = annotation(tmp_path, json.dumps(entry()) + "\n" + json.dumps({"id": 1}) + "\n")
    for read in (load_conversations, IndexedConversations):
        with pytest.raises(AnnotationError, match="entry 1: field 'conversations' is missing, got id"):
            read(path)
    path.write_bytes(json.dumps([entry(texts=("<point>", "椅子"))], ensure_ascii=False).encode("gbk"))
    with pytest.raises(AnnotationError, match="save the file as UTF-8"):
        IndexedConversations(path)


def test_numbers_are_ids_and_clouds_may_come_later(tmp_path):
    texts = ("Hello.", "Hi.", "What is <point>?", "A chair.", "And\n<point>\nbeside it?", "A lamp.")
    [conversation] = both(annotation(tmp_path, [entry([0, "b"], texts)]))
    assert conversation.object_ids == ("0", "b")
    assert both(annotation(tmp_path, [entry(0)]))[0].object_ids == ("0",)
    messages = to_messages(conversation, ["0.npy", "b.npy"])
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[0]["content"] == [{"type": "text", "text": "Hello."}]
    assert messages[2]["content"] == [{"type": "text", "text": "What is "}, {"type": "point", "point": "0.npy"},
                                      {"type": "text", "text": "?"}]  # fmt: skip
    assert messages[4]["content"] == [{"type": "text", "text": "And"}, {"type": "point", "point": "b.npy"},
                                      {"type": "text", "text": "beside it?"}]  # fmt: skip


@pytest.mark.parametrize("ids", [{}, {"object_id": None}, {"object_id": []}, {"object_id": ""}])
def test_text_alone_is_a_conversation(tmp_path, ids):
    alone = ids | {"conversations": turns("What is a chair?", "Something to sit on.")}
    first, second = both(annotation(tmp_path, [entry(), alone]))
    assert first.object_ids == ("a",) and second.object_ids == ()
    assert to_messages(second, [])[0]["content"] == [{"type": "text", "text": "What is a chair?"}]


def test_the_schemas_of_shapellm_trl_and_ms_swift(tmp_path):
    shapellm = {"id": 1, "point": "cap3d/a_8192.npy", "conversations": turns("<point>\nWhat is it?", "A chair.")}
    system = {"role": "system", "content": "Answer briefly."}
    swift = [{"role": "user", "content": "<point>What is it?"}, {"role": "assistant", "content": "A chair."}]
    parts = [{"type": "point", "point": "b"}, {"type": "text", "text": "What is it?"}]
    trl = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A chair."}]}]
    entries = [shapellm, {"messages": [system, *swift], "points": ["c"]}, {"messages": trl}]
    path = annotation(tmp_path, "\n".join(map(json.dumps, entries)))
    first, second, third = both(path)
    assert [c.object_ids for c in (first, second, third)] == [("cap3d/a_8192.npy",), ("c",), ("b",)]
    assert second.turns[0] == ("user", "Answer briefly.\n\n<point>What is it?")
    assert third.turns == (("user", "<point>What is it?"), ("assistant", "A chair."))


def test_an_id_may_be_the_path_of_its_file(tmp_path):
    (tmp_path / "cap3d").mkdir()
    (tmp_path / "cap3d" / "a_8192.npy").touch()
    assert find_cloud(tmp_path, "cap3d/a_8192.npy") == tmp_path / "cap3d" / "a_8192.npy"
    assert find_cloud(tmp_path, "cap3d/a") == tmp_path / "cap3d" / "a_8192.npy"
    (tmp_path / "b.dae").touch()
    with pytest.raises(PointCloudError, match=r"b\.dae: not a format that is read, expected one of \.npy"):
        find_cloud(tmp_path, "b")
    corrupt = f"cap3d/{sorted(CORRUPT_IDS)[0]}_8192.npy"
    path = annotation(tmp_path, [entry(), entry(corrupt)])
    assert [c.object_ids for c in both(path)] == [("a",)]
