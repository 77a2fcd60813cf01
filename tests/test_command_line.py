"""Help, spelling and the one door to every command: quick, complete, and without torch."""

import gc
import io
import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest

from pointalign import __main__ as door
from pointalign import command_line, training_command
from pointalign.command_line import PACKAGE, bracketed, options_of, shown_value, suggestion

ROOT = Path(__file__).parents[1]
CLASSES = {  # every class whose fields are options: file, section
    "pointalign.model_options.ModelOptions": "model",
    "pointalign.model_options.DataOptions": "data",
    "pointalign.options.TrainingOptions": "training",
    "pointalign.alignment.AlignmentConfig": "alignment",
    "pointalign.evaluation.results.EvaluationOptions": "",
    "pointalign.evaluation.answering.Generation": "generation",
    "pointalign.evaluation.judge.JudgeOptions": "judge",
    "pointalign.evaluation.probe.ProbeOptions": "",
}


def listed(name: str) -> list[command_line.Option]:
    module, _, class_name = name.rpartition(".")
    return options_of(PACKAGE.parent / f"{module.replace('.', '/')}.py", class_name, CLASSES[name])


EVERY_HELP = """
import contextlib, importlib, io, json, sys, time
from pointalign.__main__ import COMMANDS, main
commands = [[name] for name in COMMANDS] + [["evaluate", "judge"], ["evaluate", "report"], ["train", "finetune"], []]
pages = {}
for command in commands:
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with contextlib.suppress(SystemExit):
            main([*command, "--help"])
    pages[" ".join(command)] = [printed.getvalue(), time.process_time() - began]
for wrong in (["train", "--model.lora_rnak", "4"], ["evaluate", "--taks"], ["chat", "--modle", "x"], ["trian"]):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            status = main(wrong)
        except SystemExit as stop:
            status = stop.code
    pages[" ".join(wrong)] = [printed.getvalue(), status]
print(json.dumps({"heavy": [name for name in ("torch", "transformers") if name in sys.modules], "pages": pages}))
"""


@pytest.fixture(scope="module")
def pages() -> dict:
    """What every command prints for --help or a misspelt option, its CPU seconds or status; one process for all."""
    environment = os.environ | {"COLUMNS": "100", "POINTALIGN_HOME": "/dev/null/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_errors_of_spelling_import_no_torch_and_take_no_time(pages):
    assert pages["heavy"] == []
    for name in door.COMMANDS:
        text, seconds = pages["pages"][name]
        assert text.startswith(f"usage: pointalign {name}"), name
        assert seconds < 1, f"{name}: {seconds:.2f} CPU seconds"


def test_a_misspelt_name_gets_the_nearest(pages):
    for wrong, near in {
        "train --model.lora_rnak 4": "no option --model.lora_rnak; did you mean --model.lora_rank",
        "evaluate --taks": "no option --taks; did you mean --task",
        "chat --modle x": "no option --modle; did you mean --model",
        "trian": "no command 'trian'; did you mean train",
    }.items():
        text, status = pages["pages"][wrong]
        assert near in text and status == 2, text


def test_every_option_stands_in_help_with_its_default(pages):
    for name in CLASSES:
        module, _, class_name = name.rpartition(".")
        defaults = {
            field.name: field.default if field.default_factory is MISSING else field.default_factory()
            for field in fields(getattr(import_module(module), class_name))
        }
        options = listed(name)
        own = command_line.field_names(
            command_line.class_source(PACKAGE.parent / f"{module.replace('.', '/')}.py", class_name)
        )
        if class_name != "TrainingOptions":  # of it, those that change nothing for a user are not described
            assert [option.name.rpartition(".")[2] for option in options] == own, name
        for option in options:
            default = defaults[option.name.rpartition(".")[2]]
            assert option.text and option.default == shown_value(default), option
    for command in ("train", "evaluate", "evaluate judge", "probe"):
        classes = {"train": list(CLASSES)[:4], "evaluate": list(CLASSES)[4:7], "probe": list(CLASSES)[7:]}
        for name in classes.get(command, ["pointalign.evaluation.judge.JudgeOptions"]):
            for option in listed(name):
                assert f"  --{option.name} " in pages["pages"][command][0], (command, option.name)


def test_the_help_of_training_is_short_and_shows_what_a_recipe_sets(pages):
    text = pages["pages"]["train"][0]
    assert len(text.splitlines()) < 230 and "transformers.TrainingArguments" in text
    assert [line.split(":")[0] for line in text.splitlines() if line[:1].isupper() and ": " in line][:4] == [
        "Model", "Data", "Alignment", "Training",
    ]  # fmt: skip
    recipe = " ".join(pages["pages"]["train finetune"][0].split())
    assert "highest rate, of adapters and projectors (default: 0.0001; this recipe: 0.0005)" in recipe
    features = pages["pages"]["features"][0]
    assert "--data.feature_cache" in features and "--training." not in features


def test_subcommands_and_downloads(pages):
    for name in ("compare", "judge", "probe", "report"):
        assert f"\n  {name} " in pages["pages"]["evaluate"][0]
    assert "700 MB" in pages["pages"]["assets"][0], "with a home where nothing can be written"
    assert all(f"\n  {name} " in pages["pages"][""][0] for name in door.COMMANDS)


def test_every_argument_of_transformers_is_known_and_a_wrong_one_is_not(capsys):
    line = training_command.training_command()
    assert line.prepare(["--training.gradient_checkpointing", "true"]) == ["--training.gradient_checkpointing", "true"]
    assert line.prepare(["--training.lr_scheduler_kwargs.min_lr", "1"])[0] == "--training.lr_scheduler_kwargs.min_lr"
    with pytest.raises(SystemExit):
        line.prepare(["--training.gradient_checkponting", "true"])
    assert "did you mean --training.gradient_checkpointing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        (["--model.train", "lora"], ['--model.train=["lora"]']),
        (["--model.train", "[lora]"], ["--model.train=[lora]"]),
        (["--model.train=lora"], ['--model.train=["lora"]']),
        (["--model.train", "lora", "llm_norms", "--fused"], ['--model.train=["lora", "llm_norms"]', "--fused"]),
        (["--alignment.layer", "2", "5"], ["--alignment.layer=[2, 5]"]),
        (["--model.lora-targets", "all-linear"], ["--model.lora_targets=all-linear"]),
        (["--data.clouds", "a", "b"], ['--data.clouds=["a", "b"]']),
        (["--data.types", "null"], ["--data.types=null"]),
    ],
)
def test_lists_and_hyphens(given, prepared):
    assert training_command.training_command().prepare(given) == prepared


def test_a_list_without_values_is_left_to_the_parser():
    option = command_line.Option("task", "list[str]")
    assert bracketed(["--task", "--output", "x"], {"task": option}) == ["--task", "--output", "x"]


def test_the_section_is_suggested():
    known = ["model.lora_rank", "training.output_dir", "data.up_axis"]
    assert suggestion("output_dir", known) == "; did you mean --training.output_dir?"
    assert suggestion("up_axes", known) == "; did you mean --data.up_axis?"
    assert suggestion("nothing_like_it", known) == ""


def test_the_console_script_leads_to_the_door():
    scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].partition("\n\n")[0]
    name, _, target = scripts.replace('"', "").partition(" = ")
    module, _, function = target.partition(":")
    assert name == "pointalign" and getattr(import_module(module), function) is door.main
    for name, (module, _) in door.COMMANDS.items():
        assert callable(import_module(module).main), name
        runs_as = f"pointalign.{name}"
        assert (
            import_module(f"{runs_as}.__main__" if name in ("audit", "convert") else runs_as).main
            is import_module(module).main
        )


def test_letters_that_the_locale_lacks_are_printed_as_escapes(monkeypatch):
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="ascii"))

    def command() -> None:
        print("Ein schöner Stuhl.")
        sys.stdout.flush()

    assert command_line.run(command) == 0
    assert bytes_out.getvalue() == b"Ein sch\\xf6ner Stuhl.\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("bad"), 1, "error: bad"),
        (OSError("gone"), 1, "error: gone"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, message, capsys):
    def command() -> None:
        raise error

    assert command_line.run(command) == status
    assert capsys.readouterr().err.strip() == message


def test_what_the_caller_took_from_the_collector_stays_out_of_its_sight():
    gc.freeze()
    assert command_line.run(lambda: 0) == 0
    assert gc.get_freeze_count() > 0


def test_the_name_of_the_program_is_what_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).parent / name))
    assert command_line.program() == "pointalign"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    assert command_line.program() == f"'{tmp_path / 'my env' / 'python'}' -m pointalign"
    monkeypatch.chdir(tmp_path)
    assert command_line.program() == "'my env/python' -m pointalign"


def test_waiting_threads_sleep_unless_the_user_decides_otherwise():
    code = "import os, sys, pointalign.command_line; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for given, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [policy, "False"]
