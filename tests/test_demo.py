"""What the page does, without a browser: files, talks, figures, and what it computes about an object."""

import copy
import json
import threading
import time

import numpy as np
import pytest
import torch
from conftest import lively, tiny_model

from pointalign import assets, chat, demo
from pointalign.conversation import Conversation, Decoding
from pointalign.data.point_cloud import PointCloudError
from pointalign.models import PointAlignForConditionalGeneration
from pointalign.page import examples, insight, intake, talk

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def model():
    return lively(tiny_model())


@pytest.fixture
def visitor(model, processor, clouds) -> talk.Talk:
    visitor = talk.Talk(model, processor)
    visitor.put(0, intake.Item("first", clouds[0][:300]))
    return visitor


# -- files -------------------------------------------------------------------------------------------------------------


def saved(path, cloud):
    np.save(path, cloud)
    return path


def test_an_uploaded_file_is_read_as_chat_reads_it_and_removed(tmp_path, processor, clouds):
    path = saved(tmp_path / "a chair.npy", clouds[0][:300])
    item = intake.read_upload(path, processor.feature_extractor, "y")
    assert item.name == "a chair.npy" and not path.exists()
    np.testing.assert_array_equal(item.points, clouds[0][:300])
    turned = intake.read_upload(saved(path, clouds[0][:300]), processor.feature_extractor, "z")
    np.testing.assert_allclose(turned.points[:, 1], clouds[0][:300, 2], atol=1e-6)


@pytest.mark.parametrize("kind", ["large", "many", "few", "format", "lie"])
def test_a_file_that_cannot_be_used_is_named_without_its_folder_and_removed(
    kind, tmp_path, processor, clouds, monkeypatch
):
    path = saved(tmp_path / "bad.npy", clouds[0][: 7 if kind == "few" else 300])
    if kind == "large":
        monkeypatch.setattr(intake, "MAX_MEGABYTES", 0)
    elif kind == "many":
        monkeypatch.setattr(intake, "MAX_POINTS", 200)
    elif kind == "format":
        path = path.rename(tmp_path / "bad.exe")
    elif kind == "lie":  # a header that promises a terabyte
        path.write_bytes(path.read_bytes().replace(b"(300, 6)", b"(9999999999, 6)"[:15], 1))
    if kind in ("large", "many"):  # refused before a point is read
        monkeypatch.setattr(intake, "read_point_cloud", lambda *_: pytest.fail("the file was parsed"))
    with pytest.raises(PointCloudError) as error:
        intake.read_upload(path, processor.feature_extractor, "y")
    message = intake.short(str(error.value))
    assert message.startswith(path.name) and str(tmp_path) not in message and len(message) <= intake.LONGEST_MESSAGE
    assert not path.exists()


def test_a_long_message_becomes_a_short_line():
    assert intake.short("a\n  b") == "a b"
    assert len(intake.short("word " * 200)) <= intake.LONGEST_MESSAGE


# -- talks -------------------------------------------------------------------------------------------------------------


def test_the_page_answers_as_chat_does(model, processor, clouds, tmp_path, capsys):
    """Greedy and drawn, two questions, two files: through the command line and through the page."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    files = [saved(tmp_path / f"{number}.npy", clouds[number]) for number in range(2)]
    questions = ["What are these?", "Why?"]
    for extra, decoding in (([], Decoding(12)), (["--temperature", "0.9", "--seed", "3"], Decoding(12, 0.9, 3))):
        asked = [argument for question in questions for argument in ("--question", question)]
        assert chat.main([*map(str, files), *asked, "--model", str(tmp_path / "model"), "--max_new_tokens", "12",
                          *extra]) == 0  # fmt: skip
        printed = capsys.readouterr().out
        visitor = talk.Talk(model, processor)
        for slot, file in enumerate(files):
            visitor.put(slot, intake.Item(file.name, np.load(file).astype(np.float32)))
        count = processor.feature_extractor.num_points
        answers = [list(visitor.answer(question, count, decoding))[-1].text for question in questions]
        expected = "".join(f"> {question}\n{answer}\n" for question, answer in zip(questions, answers, strict=True))
        assert printed.endswith(expected) and answers[0]


def test_replies_carry_time_and_end_with_the_answer(visitor):
    replies = list(visitor.answer(QUESTION, 256, Decoding(8)))
    last = replies[-1]
    assert last.done and not last.stopped and 0 < last.first <= last.seconds
    assert not any(reply.done for reply in replies[:-1])
    assert visitor.conversation.turns == [(QUESTION, last.text)] and not visitor.busy


def test_fewer_points_are_another_cloud(visitor):
    list(visitor.answer(QUESTION, 100, Decoding(4)))
    assert len(visitor.conversation.clouds[0]) == 100


def test_objects_take_their_slots_and_begin_a_new_conversation(visitor, clouds):
    list(visitor.answer(QUESTION, 256, Decoding(4)))
    visitor.put(1, intake.Item("second", clouds[1][:300]))
    assert visitor.conversation.turns == []
    list(visitor.answer("Which?", 256, Decoding(4)))
    np.testing.assert_array_equal(visitor.conversation.clouds[1][:5, 3:], clouds[1][:5, 3:])
    visitor.remove_second()
    assert list(visitor.items) == [0] and visitor.conversation.turns == []
    empty = talk.Talk(visitor.model, visitor.processor)
    empty.put(1, intake.Item("only", clouds[1][:300]))
    assert list(empty.items) == [0], "the only object is the first"


def test_every_visitor_has_a_talk_and_all_share_the_model(visitor):
    other = copy.deepcopy(visitor)
    assert other.items == {} and other.model is visitor.model and other.conversation is not visitor.conversation


def test_a_request_that_fails_leaves_the_talk_usable(visitor, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PointAlignForConditionalGeneration, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(visitor.answer(QUESTION, 256, Decoding(4)))
    with pytest.raises(ValueError, match="no question"):
        list(visitor.answer("  ", 256, Decoding(4)))
    assert list(visitor.answer(QUESTION, 256, Decoding(4)))[-1].done
    nothing = talk.Talk(visitor.model, visitor.processor)
    with pytest.raises(ValueError, match="pick an example or drop a file"):
        list(nothing.answer(QUESTION, 256, Decoding(4)))


class Slow(Conversation):
    """Says a word after the other until it is stopped."""

    pause = 0.02  # seconds

    def ask(self, question, decoding=None, on_text=None, stop=None):
        text = ""
        while not stop.is_set():
            text += "on "
            on_text(text)
            time.sleep(self.pause)
        self.turns.append((question, text))
        return type("Answer", (), {"text": text.strip()})()


def test_stop_ends_an_answer_and_clear_discards_it(visitor, model, processor):
    visitor.conversation = Slow(model, processor)
    replies = visitor.answer(QUESTION, 256, Decoding())
    next(replies)
    with pytest.raises(ValueError, match="still under way"):
        next(visitor.answer("And?", 256, Decoding()))
    visitor.stop()
    last = list(replies)[-1]
    assert last.done and last.stopped and last.text.startswith("on")
    visitor.conversation = Slow(model, processor)
    replies = visitor.answer(QUESTION, 256, Decoding())
    next(replies)
    visitor.clear()
    assert list(replies) == [] and visitor.conversation.turns == [] and not visitor.busy
    assert threading.active_count() < 20


# -- what is computed and drawn ----------------------------------------------------------------------------------------


def test_points_take_the_attention_of_their_patch(model, processor, clouds):
    from pointalign.attention_maps import attention_maps

    cloud = clouds[0] * np.array([5, 5, 5, 1, 1, 1], np.float32) + np.array([9, 0, 0, 0, 0, 0], np.float32)
    looked = insight.gaze(model, processor, cloud, 256, cloud)
    assert looked.values.shape == (len(cloud),) and looked.patches == 8
    values = torch.from_numpy(processor.feature_extractor.prepare(cloud))[None]
    maps = attention_maps(model, values)
    read = insight.subsample(cloud, 256)
    at_centres = insight.gaze(model, processor, cloud, 256, read)
    for centre, weight in zip(maps.centres[0], maps.on_patches()[0], strict=True):
        place = int(((values[0, :, :3] - centre) ** 2).sum(dim=1).argmin())  # a centre is a point that the model reads
        assert at_centres.values[place] == pytest.approx(float(weight))
    single = insight.gaze(model, processor, cloud, 256, cloud, query=2)
    assert not np.allclose(single.values, looked.values)


def test_similarity_is_known_for_every_layer(model, processor, clouds):
    similar = insight.layer_similarity(model, processor, clouds[0], 256)
    assert list(similar) == [0, 1, 2, 3, 4] and all(0 < value <= 1 + 1e-9 for value in similar.values())
    other = insight.layer_similarity(model, processor, clouds[1], 256)
    assert similar != other


def test_figures_show_the_cloud_upright_and_undistorted(clouds):
    views = pytest.importorskip("pointalign.page.views", reason="plotly is not installed")
    figure = views.cloud_figure(clouds[0])
    scene = figure.layout.scene
    assert scene.aspectmode == "data" and scene.camera.up.to_plotly_json() == {"x": 0, "y": 1, "z": 0}
    trace = figure.data[0]
    np.testing.assert_array_equal(trace.y, clouds[0][:, 1])
    red, green, blue = (clouds[0][0, 3:] * 255).round().astype(int)
    assert trace.marker.color[0] == f"rgb({red},{green},{blue})"
    values = np.linspace(0.3, 3, len(clouds[0]))
    looked = views.attention_figure(clouds[0], values).data[0].marker
    np.testing.assert_allclose(2.0 ** np.asarray(looked.color), values)
    assert (looked.cmin, looked.cmax) == (-2, 2) and looked.colorbar.ticktext == ("1/4", "1/2", "1", "2", "4")
    extreme = views.attention_figure(clouds[0], np.full(len(clouds[0]), 0.0)).data[0].marker
    assert (extreme.cmin, extreme.cmax) == (-3, 3) and np.isfinite(extreme.color).all()
    line = views.layer_figure({0: 0.9, 1: 0.5, 2: 0.52})
    assert list(line.data[0].x) == [0, 1, 2] and list(line.data[0].y) == [0.9, 0.5, 0.52]
    assert line.layout.yaxis.range == (0, 1.02), "a small difference looks small"
    above = views.cloud_figure(clouds[0], "above").layout.scene.camera.eye
    assert above.y > 5 * abs(above.x) and above.y > 5 * abs(above.z)


def test_examples_are_held_out_and_name_their_makers():
    if not (assets.home() / "furniture" / "objects.json").exists():
        pytest.skip("the embedded objects are not here: `pointalign assets` fetches them")
    folder = assets.home() / "furniture"
    records = {r["object_id"]: r for r in json.loads((folder / "objects.json").read_text())}
    items = examples.load_examples(folder)
    assert len(items) == 12 and all(records[name]["split"] == "test" for name in examples.EXAMPLES)
    assert all("CC" in item.notes[0] and item.points.shape == (8192, 6) for item in items)
    picture = examples.thumbnail(items[0])
    assert picture.shape == (examples.THUMBNAIL, examples.THUMBNAIL, 3) and picture.std() > 10


def test_missing_packages_and_models_are_one_line(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "gradio" else True)
        assert demo.main([]) == 1
    assert capsys.readouterr().err == "error: the page needs gradio: pip install 'pointalign[demo]'\n"
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    assert demo.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
