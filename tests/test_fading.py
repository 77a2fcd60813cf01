"""The study of fading: its gate can fail, its arms differ in their targets alone, its cells are run once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.ablation.train_arm import Schedule, TargetFromBatch, aligned_model
from experiments.fading import __main__ as command
from experiments.fading import cell, gate, summary
from experiments.fading.grid import (
    ARMS,
    BASELINE,
    FIRST,
    LAYERS,
    LONGER,
    METHOD,
    STUDIES,
    TIERS,
    WRONG_TARGETS,
    Sizes,
    Study,
)
from experiments.fading.things import COLOURS, FACTORS_B, POINTS, SHAPES, draw, held_out_things, sample, training_things
from experiments.fading.words import B_WORDS, END, IDS, MORE, NAMING, encode, tell
from pointalign.evaluation import probe
from pointalign.trainer import AlignedModel

TINY = Sizes(
    captions=Schedule(steps=12, batch_size=4, learning_rate=1e-3),
    few_shot=Schedule(steps=0, batch_size=4, learning_rate=1e-3),
    few_shot_steps={2: 1, 4: 1},
    probe_rows=64,
)
TINY_TIERS = ((BASELINE, METHOD), WRONG_TARGETS[:1])


def oracle(things: list):
    """Things whose Q-Former tokens hold all factors as they are, in directions of their own."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(0, 0.01, (len(things), gate.QUERIES, gate.WIDTH))).float()
    for row, thing in enumerate(things):
        features[row, :, [SHAPES.index(thing.shape), 10 + list(COLOURS).index(thing.colour)]] += 1
        for place, name in enumerate(FACTORS_B):
            features[row, place, 40 + place] += 8 * getattr(thing, name)
    return gate.encoded_objects(things, features, features + 1)


@pytest.fixture(scope="module")
def objects():
    return (
        oracle([thing for thing, _ in training_things(150)]),
        oracle([thing for thing, _ in held_out_things(2)]),
    )


@pytest.fixture(scope="module")
def point_model():
    return gate.point_model()


# -- things and words --------------------------------------------------------------------------------------------------


def test_captions_name_set_a_alone_and_every_text_is_in_the_vocabulary():
    thing = draw(np.random.default_rng(0))
    other = replace(thing, **{name: 1 - getattr(thing, name) for name in FACTORS_B})
    assert thing.caption() == other.caption() and thing.colour in thing.caption() and thing.shape in thing.caption()
    low, high = (tell(dict.fromkeys(FACTORS_B, value)) for value in (0.1, 0.9))
    assert (low, high) == ("short straight small low .", "tall bent big high .")
    examples = encode([(NAMING[0], thing.caption(), 7), (MORE, high, 3)], gate.QUERIES)
    assert examples.mask.sum(dim=1).tolist() == [gate.QUERIES] * 2 and examples.rows.tolist() == [7, 3]
    answer = [IDS[word] for word in thing.caption().split()] + [IDS[END]]
    assert examples.labels[0][examples.labels[0] != -100].tolist() == answer
    assert examples.ids[0][examples.labels[0] != -100].tolist() == answer
    with pytest.raises(KeyError):
        encode([("unheard ?", "", 0)], gate.QUERIES)


def test_a_thing_depends_on_its_number_alone_and_held_out_things_fill_every_combination():
    (thing, rng), (again, other_rng) = training_things(3)[2], training_things(9)[2]
    cloud = sample(thing, rng)
    assert thing == again and np.array_equal(cloud, sample(again, other_rng))
    assert cloud.shape == (POINTS, 6) and np.linalg.norm(cloud[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
    captions = [thing.caption() for thing, _ in held_out_things(2)]
    assert len(captions) == 48 and {captions.count(caption) for caption in captions} == {2}


@pytest.mark.parametrize("factor", FACTORS_B)
def test_every_factor_of_b_changes_the_cloud(factor):
    thing = draw(np.random.default_rng(1), "cone", "red")
    low, high = (sample(replace(thing, **{factor: value}), np.random.default_rng(5)) for value in (0.0, 1.0))
    assert np.abs(low - high).mean() > 0.01


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_the_gate_reads_oracle_tokens_and_refuses_noise(objects):
    train, held_out = objects
    read = gate.read_gate(train, held_out)
    assert min(read[f"B: {name}"] for name in FACTORS_B) > 0.99 and gate.failures(read) == []
    noise = [replace(part, features=torch.randn_like(part.features)) for part in objects]
    assert len(gate.failures(gate.read_gate(*noise))) == 6
    assert gate.failures({"B: bend": float("nan")}) == ["B: bend nan, expected at least 0.85"]


def test_without_the_gate_nothing_is_run(objects, point_model, tmp_path, monkeypatch, capsys):
    passed = {"sizes": {}, "read": {"B: bend": 0.84}}
    monkeypatch.setattr(gate, "prepare", lambda folder, *sizes: (point_model, *objects, passed))
    monkeypatch.setattr(command, "run_cell", lambda *arguments: pytest.fail("a cell was run"))
    assert command.run(Study(TINY, TIERS), tmp_path / "fading", tmp_path, 1, (1, 1, 1)) == command.CANNOT_TEST
    assert "cannot test: the tokens do not hold B: bend 0.840" in capsys.readouterr().out


def test_the_point_branch_learns_and_its_tokens_are_cached(tmp_path, monkeypatch):
    first = gate.prepare(tmp_path, 128, 40, 1)
    state, fresh = first[0].state_dict(), gate.point_model().state_dict()
    changed = {name.split(".")[1] for name in state if not torch.equal(state[name], fresh[name])}
    assert changed == {"point_encoder", "point_mlp", "qformer", "query_tokens"}
    monkeypatch.setattr(gate, "train_point_branch", lambda *arguments: pytest.fail("trained a second time"))
    second = gate.prepare(tmp_path, 128, 40, 1)
    for ours, theirs in zip(first[1:3], second[1:3], strict=True):
        assert torch.equal(ours.features, theirs.features) and torch.equal(ours.encoder, theirs.encoder)
        assert ours.properties == theirs.properties
    assert first[3] == second[3]


def test_a_clone_repeats_the_gate_of_the_committed_cells_or_refuses_to_mix(tmp_path):
    first = gate.prepare(tmp_path, 128, 40, 1)
    (tmp_path / gate.TOKEN_FILE).unlink()
    again = gate.prepare(tmp_path, 128, 40, 1)
    assert torch.equal(first[1].features, again[1].features) and (tmp_path / gate.TOKEN_FILE).exists()
    (tmp_path / gate.TOKEN_FILE).unlink()
    content = json.loads((tmp_path / gate.GATE_FILE).read_text())
    content["read"]["B: bend"] += 0.1
    (tmp_path / gate.GATE_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another machine's point branch \(B: bend .* choose another --output"):
        gate.prepare(tmp_path, 128, 40, 1)
    with pytest.raises(ValueError, match="choose another --output"):
        gate.prepare(tmp_path, 128, 41, 1)


# -- a cell ------------------------------------------------------------------------------------------------------------


def test_tokens_enter_at_the_size_of_words_through_a_frozen_projector(objects, point_model):
    features = objects[0].features
    sizes = {}
    for name in (BASELINE, "large tokens, no alignment", "trained projector, no alignment"):
        model = cell.new_decoder(point_model, ARMS[name], features, seed=0)
        projector = model.model.modality_projector
        words = model.get_input_embeddings().weight[4:].norm(dim=-1).mean()
        sizes[name] = (projector(features).norm(dim=-1).mean() / words).item()
        trains = {parameter.requires_grad for parameter in projector.parameters()}
        assert trains == {name.startswith("trained")}
        assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())
        assert not any(parameter.requires_grad for parameter in model.model.qformer.parameters())
    assert list(sizes.values()) == pytest.approx([1, 30, 1], rel=1e-4)


def batches_of(name: str, objects, point_model, monkeypatch) -> tuple[AlignedModel, list[dict]]:
    """The model of an arm and the batches that its training would see."""
    seen: list[dict] = []
    monkeypatch.setattr(cell, "optimise", lambda aligned, batches, schedule, description: seen.extend(batches))
    decoder = ARMS[name]
    model = cell.new_decoder(point_model, decoder, objects.features, seed=0)
    aligned = aligned_model(model, decoder.arm, decoder.arm.weight or 0.0, 0, decoder.layer_weights)
    examples = cell.caption_examples(objects, gate.QUERIES)
    cell.train(aligned, examples, objects, TINY.captions, 0, name, decoder.arm)
    return aligned, seen


def test_arms_of_a_seed_see_the_same_batches_and_wrong_targets_are_wrong(objects, point_model, monkeypatch):
    arms = {
        name: batches_of(name, objects[0], point_model, monkeypatch)
        for name in (BASELINE, METHOD, *WRONG_TARGETS, "encoder target")
    }
    plain = arms[BASELINE][1]
    for aligned, batches in arms.values():
        assert len(batches) == TINY.captions.steps
        for ours, theirs in zip(batches, plain, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert isinstance(aligned, TargetFromBatch) == ("target_tokens" in batches[0])
    own = plain[0]["query_features"]
    assert type(arms[METHOD][0]) is AlignedModel and "target_tokens" not in arms[METHOD][1][0]
    other, random = (arms[name][1][0]["target_tokens"] for name in WRONG_TARGETS)
    assert torch.equal(other, own.roll(1, dims=0)) and not any(map(torch.equal, other, own))
    assert random.shape == own.shape and abs(torch.corrcoef(torch.stack([random.flatten(), own.flatten()]))[0, 1]) < 0.1
    assert torch.equal(arms["encoder target"][1][0]["target_tokens"], own + 1)
    assert not torch.equal(plain[0]["input_ids"], plain[1]["input_ids"])


def test_learned_layers_have_weights_that_train(objects, point_model):
    decoder = ARMS["learned layers"]
    model = cell.new_decoder(point_model, decoder, objects[0].features, seed=0)
    aligned = aligned_model(model, decoder.arm, 1.0, 0, decoder.layer_weights)
    assert aligned.alignment.layers == [1, 2, 3, 4, 5, 6, 7] and aligned.alignment.layer_logits.requires_grad
    assert aligned.alignment.layer_weights().sum().item() == pytest.approx(1)
    assert not hasattr(aligned_model(model, ARMS["three layers"].arm, 1.0, 0).alignment, "layer_logits")


def test_states_by_layer_are_those_of_a_forward_pass_with_text(objects, point_model):
    train, _ = objects
    few = train.subset(range(3))
    model = cell.new_decoder(point_model, ARMS[BASELINE], train.features, seed=0)
    states = cell.point_states(model, few)
    examples = cell.caption_examples(few, gate.QUERIES).subset([0, 2, 4])
    with torch.inference_mode():
        hidden = model(**cell.inputs(examples, few), output_hidden_states=True).hidden_states
    assert sorted(states) == list(range(LAYERS + 1))
    for layer in (3, LAYERS - 1):  # the last entry of hidden_states has passed the final norm
        torch.testing.assert_close(states[layer].flatten(0, 1), hidden[layer][examples.mask])
    positions = hidden[0][examples.mask].view(states[0].shape) - states[0]  # which the decoder adds, equal in all rows
    torch.testing.assert_close(positions, positions[:1].expand_as(positions))


def test_captions_count_where_every_token_is_right_and_b_word_by_word(objects, point_model, monkeypatch):
    few = objects[1].subset(range(3))
    model = cell.new_decoder(point_model, ARMS[BASELINE], few.features, seed=0)
    examples = cell.caption_examples(few, gate.QUERIES)
    following = examples.ids.roll(-1, dims=1)
    perfect = torch.nn.functional.one_hot(following, len(IDS)).float()
    monkeypatch.setattr(cell, "logits", lambda model, examples, objects: perfect)
    assert cell.captions_right(model, few).tolist() == [2, 2, 2]
    last = int((examples.labels[0] != -100).nonzero().max())
    perfect[0, last - 1] = 0
    perfect[0, last - 1, IDS["tall"]] = 1
    assert cell.captions_right(model, few).tolist() == [1, 2, 2]

    told = cell.b_examples(few, range(3), gate.QUERIES)
    scores = torch.zeros(*told.ids.shape, len(IDS))
    scores[..., [IDS[above] for _, above in B_WORDS.values()]] = 1
    monkeypatch.setattr(cell, "logits", lambda model, examples, objects: scores)
    truth = np.array([[few.properties[f"B: {name}"][row] > 0.5 for name in FACTORS_B] for row in range(3)])
    assert cell.b_right(model, few).tolist() == truth.tolist() and truth.any() and not truth.all()
    perfect = torch.nn.functional.one_hot(told.ids.roll(-1, dims=1), len(IDS)).float()
    monkeypatch.setattr(cell, "logits", lambda model, examples, objects: perfect)
    assert cell.b_right(model, few).all()


def test_retrieval_looks_among_objects_of_equal_captions_only(objects):
    train, held_out = objects
    rng = torch.Generator().manual_seed(0)
    blind = [torch.randn(len(part.ids), gate.QUERIES, 16, generator=rng) for part in objects]
    assert cell.retrieval(train.features, held_out.features, train, held_out) > 0.9
    assert cell.retrieval(*blind, train, held_out) < 0.75, "two objects to choose from: about one half by chance"


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_the_plan_has_every_arm_and_seed_once_and_the_decisive_arms_first():
    cells = STUDIES[LONGER].plan(5)
    assert sorted(cells) == sorted((arm, seed) for arm in ARMS for seed in range(5)) and len(set(cells)) == len(cells)
    assert {arm for arm, _ in cells[:20]} == set(TIERS[0]) == {BASELINE, METHOD, *WRONG_TARGETS}
    assert all(arm.baseline in ARMS for arm in ARMS.values())
    assert STUDIES[FIRST].plan(5) == cells[:30], "the arms of the primary comparisons"
    first, longer = STUDIES[FIRST].sizes, STUDIES[LONGER].sizes
    assert replace(longer, few_shot_steps=first.few_shot_steps) == first, "nothing else differs"


@pytest.fixture
def tiny_grid(objects, point_model, tmp_path, monkeypatch):
    """Runs a grid of three arms on oracle tokens and returns how many cells it ran."""
    monkeypatch.setattr(probe, "FIT_STEPS", 3)
    passed = {"sizes": {"seen": 1}, "read": {"B: bend": 0.99}}
    (tmp_path / gate.GATE_FILE).write_text(json.dumps(passed))
    monkeypatch.setattr(gate, "prepare", lambda folder, *sizes: (point_model, *objects, passed))

    def run(seeds: int = 2, sizes: Sizes = TINY) -> int:
        ran = []

        def counted(*arguments):
            ran.append(arguments[1:3])
            return cell.run_cell(*arguments)

        monkeypatch.setattr(command, "run_cell", counted)
        assert command.run(Study(sizes, TINY_TIERS), tmp_path / "fading", tmp_path, seeds, (1, 1, 1)) == 0
        return len(ran)

    return run


def test_finished_cells_are_skipped_and_a_report_lacks_what_is_missing(tiny_grid, tmp_path, capsys):
    folder = tmp_path / "fading"
    assert tiny_grid() == 6
    first = json.loads((tmp_path / "fading.json").read_text())
    assert first["missing"] == [] and first["answer"] == "unfinished" and (tmp_path / "fading.png").stat().st_size
    paths = [summary.cell_file(folder, arm, 1) for arm in (BASELINE, METHOD, WRONG_TARGETS[0])]
    contents = [json.loads(path.read_text()) for path in paths]
    assert all(a["probes"]["B: bend"]["0"] == contents[0]["probes"]["B: bend"]["0"] for a in contents), "one start"
    assert len({str(content["losses"]) for content in contents}) == 3, "the arms differ"
    assert contents[0]["losses"]["alignment"] == [0.0] * 10 and min(contents[1]["losses"]["alignment"][:3]) > 0

    paths[2].unlink()
    assert command.report(Study(TINY, TINY_TIERS), folder, tmp_path, 2) == 0
    assert json.loads((tmp_path / "fading.json").read_text())["missing"] == [f"{WRONG_TARGETS[0]}, seed 1"]
    assert tiny_grid() == 1
    again = json.loads(paths[2].read_text())
    unequal = {key for key in again if again[key] != contents[2][key]}
    assert unequal <= {"seconds", "versions"}, "a cell that is run again gives the same result"
    with pytest.raises(ValueError, match="sizes differ"):
        tiny_grid(sizes=replace(TINY, probe_rows=32))
    assert "about" in capsys.readouterr().out
