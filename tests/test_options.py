"""One dotted namespace over one recipe; whatever does not fit is named."""

import pytest

from pointalign.options import DataOptions, ModelOptions, parse


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_no_arguments_mean_the_demo():
    options = parse([])
    assert options.model.checkpoint == "furniture-stage1" and options.model.train == ["lora"]
    assert options.alignment.weight == 0.1 and options.alignment.target == "qformer" and options.alignment.layer == []
    assert options.training.contrastive_steps == 1000 and options.training.max_steps == 20 and options.fused is False


def test_a_recipe_by_name_by_path_and_under_options(tmp_path):
    assert parse(["scratch"]).alignment.weight == 0.0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("alignment:\n  weight: 0.3\n  layer: [2, 5]\ntraining:\n  max_steps: 7\n")
    options = parse([str(recipe), "--training.max_steps", "9", "--model.llm", "folder", "--fused"])
    assert options.alignment.weight == 0.3 and options.alignment.layer == [2, 5]
    assert options.training.max_steps == 9 and options.model.llm == "folder" and options.fused is True
    assert options.model.checkpoint is None, "a recipe of one's own does not inherit the demo's values"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--alignment.wieght", "1"], "alignment.wieght"),
        (["--modle.llm", "x"], "modle.llm"),
        (["--training.max_steps", "many"], "max_steps"),
        (["--alignment.weight=-1"], "alignment.weight=-1"),
        (["--alignment.target", "clip"], "alignment.target='clip'"),
        (["--model.train", "[lora, head]"], "unknown part 'head'"),
        (["--model.dtype", "float16"], "model.dtype='float16'"),
        (["--data.evaluate", "all"], "data.evaluate='all'"),
        (["--data.annotations", "a.json"], "data.annotations and data.clouds belong together"),
        (["scratch", "--data.fold", "0"], "data.fold: of the embedded objects only, without validation"),
        (["nowhere"], "no recipe 'nowhere'"),
        (["nowhere.yaml"], "no recipe 'nowhere.yaml'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, named, capsys):
    assert named in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alignment:\n  wieght: 1\n", "wieght"),
        ("optimiser: adam\n", "optimiser"),
        ("alignment:\n  weight: heavy\n", "weight"),
        ("alignment: [1\n", "line 1, column 12"),
    ],
)
def test_a_malformed_recipe_is_named(text, named, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert named in refused([str(recipe)], capsys)


def test_defaults_are_valid_alone():
    assert ModelOptions().train == ["lora"] and DataOptions().num_points is None


def test_an_abbreviated_option_is_unknown(capsys):
    with pytest.raises(SystemExit):
        parse(["scratch", "--training.contrastive_step", "3"])
    assert "--training.contrastive_step" in capsys.readouterr().err
