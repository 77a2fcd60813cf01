"""The command line, through a tiny exported model."""

import gc
import shutil

import numpy as np
import pytest
from conftest import lively, tiny_model

from pointalign import build, chat, conversation
from pointalign.data import point_cloud
from pointalign.models import PointAlignFeatureExtractor, PointAlignForConditionalGeneration, PointAlignProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    path = tmp_path_factory.mktemp("exported")
    lively(tiny_model()).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def files(tmp_path, clouds):
    paths = [str(tmp_path / f"{i}.npy") for i in range(3)]
    for path, cloud in zip(paths, clouds, strict=False):
        np.save(path, cloud[:300])
    return paths


def run(folder, *arguments) -> int:
    return chat.main([*arguments, "--model", str(folder), "--max-new-tokens", "3"])


@pytest.fixture
def talks(monkeypatch):
    """What the template is given, as (role, clouds, text)."""
    seen = []
    original = PointAlignProcessor.apply_chat_template

    def spy(self, messages, **options):
        rows = []
        for one in messages:
            content = one["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            number = sum(item["type"] == "point" for item in items)
            rows.append((one["role"], number, "".join(item.get("text", "") for item in items)))
        seen.append(rows)
        return original(self, messages, **options)

    monkeypatch.setattr(PointAlignProcessor, "apply_chat_template", spy)
    return seen


def test_two_questions_about_several_files_in_one_talk(folder, files, talks, capsys):
    assert run(folder, *files, "--question", "Which is taller?", "--question", "Why?") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{i}.npy: 300 points" for i in range(3)]
    assert "> Which is taller?" in lines and "> Why?" in lines
    first, second = talks
    assert first == [("user", 3, "Which is taller?")]
    assert second[:1] == first and second[1][:2] == ("assistant", 0) and second[2] == ("user", 0, "Why?")


def test_without_a_name_the_newest_run_answers(folder, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "runs" / "demo-2" / "model")
    monkeypatch.chdir(tmp_path)
    assert chat.main([files[0], "--question", "What?", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert "model: runs/demo-2/model, which `make train` made" in printed.err
    named = run(folder, files[0], "--question", "What?"), capsys.readouterr().out
    assert named == (0, printed.out)


def test_a_talk_at_the_prompt_ends_with_an_empty_line_or_the_end_of_input(folder, files, talks, monkeypatch):
    lines = iter(["What is this?", "  "])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(folder, files[0]) == 0
    assert talks == [[("user", 1, "What is this?")]]

    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(folder, files[0]) == 0


@pytest.mark.parametrize("kind", ["missing", "nan", "few", "columns", "format"])
def test_a_bad_file_is_named(kind, folder, files, clouds, tmp_path, capsys):
    path = tmp_path / ("bad.xyz" if kind == "format" else "bad.npy")
    spoiled = {"nan": np.full((300, 6), np.nan), "few": clouds[0][:7], "columns": clouds[0][:300, :4]}
    if kind in spoiled:
        np.save(path, spoiled[kind])
    elif kind == "format":
        path.write_text("1 2 3")
    assert run(folder, files[0], str(path), "--question", "What?") == 1
    shown = capsys.readouterr()
    assert "error: " in shown.err and str(path) in shown.err and "Traceback" not in shown.err


def test_a_plain_language_model_is_refused_before_it_is_read(files, tmp_path, capsys):
    """Its config.json alone is there: nothing else need be read to refuse it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run(tmp_path, files[0], "--question", "What?") == 1
    message = capsys.readouterr().err
    assert "holds a model of type 'llama', not 'pointalign'" in message and "expected a folder written by" in message


def test_ctrl_c_ends_a_talk_in_one_line(folder, files, monkeypatch, capsys):
    """While the model is read, while it answers, and at the prompt."""

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    for owner, name in ((build, "load"), (PointAlignForConditionalGeneration, "generate")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert run(folder, files[0], "--question", "What?") == 130
        assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    monkeypatch.setattr("builtins.input", stop)
    assert run(folder, files[0]) == 0


def test_the_files_of_a_talk_are_turned_as_in_training(folder, files, tmp_path, monkeypatch, capsys):
    """Without --up_axis the model's own; with it, what the user says."""
    turned = tmp_path / "turned"
    shutil.copytree(folder, turned)
    processor = PointAlignProcessor.from_pretrained(turned)
    processor.feature_extractor.up_axis = "z"
    processor.save_pretrained(turned)
    seen = []
    prepare = PointAlignFeatureExtractor.prepare
    monkeypatch.setattr(PointAlignFeatureExtractor, "prepare", lambda self, c: (seen.append(c), prepare(self, c))[1])
    for model, extra in ((folder, []), (turned, []), (turned, ["--up-axis", "y"])):
        assert run(model, files[0], "--question", "What?", *extra) == 0
    plain, turned_cloud, named = seen[::2]
    assert np.array_equal(plain, named)
    np.testing.assert_allclose(turned_cloud[:, 1], plain[:, 2], atol=1e-6)


def test_a_file_is_read_once_where_the_model_reads_files_in_the_usual_way(folder, files, tmp_path, monkeypatch):
    """Shipped models say how they read files even where that is the usual way."""
    read = []
    original = point_cloud.read_point_cloud
    monkeypatch.setattr(point_cloud, "read_point_cloud", lambda *values: (read.append(values[0]), original(*values))[1])
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    processor = PointAlignProcessor.from_pretrained(changed)
    for reading, times in (({"missing_color": "black", "parts": "points"}, 1), ({"missing_color": "grey"}, 2)):
        read.clear()
        processor.feature_extractor.reading = reading
        processor.save_pretrained(changed)
        assert run(changed, files[0], "--question", "What?") == 0
        assert len(read) == times


@pytest.fixture
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.freeze()


def test_the_collector_rests_while_the_model_is_loaded_and_runs_again_after(folder, files, monkeypatch, nothing_frozen):
    states = []
    original, ask = build.load, conversation.Conversation.ask
    monkeypatch.setattr(build, "load", lambda *a, **o: (states.append(gc.isenabled()), original(*a, **o))[1])
    monkeypatch.setattr(
        conversation.Conversation,
        "ask",
        lambda *a, **o: (states.append((gc.isenabled(), gc.get_freeze_count() > 0)), ask(*a, **o))[1],
    )
    assert run(folder, files[0], "--question", "What?") == 0
    assert states == [False, (True, True)] and gc.isenabled() and gc.get_freeze_count() == 0


def test_a_missing_model_and_a_wrong_axis_are_errors(folder, files, capsys):
    assert run(folder / "nowhere", files[0], "--question", "What?") == 1
    assert "nowhere" in capsys.readouterr().err
    assert run(folder, files[0], "--question", "What?", "--up-axis", "w") == 1
    assert "up_axis must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chat.main([])
