"""The definition of an ablation, read from a YAML file."""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.ablation.measure import GEOMETRY, MEASURES, PRIMARY
from experiments.ablation.train_arm import Arm, Schedule
from pointalign.model_options import ModelOptions

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class Recipe:
    """An ablation.

    Attributes:
        data: `furniture` or `shapes`.
        model: the model that every arm starts from, and what trains.
        decoder: sizes of a `LlamaConfig` for a new decoder in place of the language model, which trains completely,
            together with a new modality projector. Small enough for a CPU, and without prior knowledge of language.
        full_fine_tuning: train all weights of the language model, in float32, in place of adapters; the point branch
            and the modality projector stay frozen.
        questions: kind of conversation about the furniture (as its annotations name it) -> share of the batches, each
            of one kind. Held-out objects are then asked the geometry questions too. By default each sample is any
            question of one round about its object, and held-out objects are asked for their names.
        primary: measures, fixed in advance, that decide; p-values are corrected over arms and over these.
        schedule: training of every arm.
        weight: lambda of the arms that name none.
        seeds: paired seeds of the arms that name none.
        baseline: the arm that all others are compared with.
        train, held_out: limits on the objects of each part.
        layers: number of layers probed after each run.
        few_shot: numbers of examples about set B of the shapes that a trained arm is fine-tuned on; none by default.
        arms: by name.
        output: folder of the results.
        fold: hold out this fold (of five) of the furniture's families in place of the committed split;
            `model.checkpoint` must have been trained under the same fold.
    """

    data: str = "furniture"
    model: ModelOptions = field(default_factory=ModelOptions)
    decoder: dict[str, int] | None = None
    full_fine_tuning: bool = False
    questions: dict[str, float] = field(default_factory=dict)
    primary: list[str] = field(default_factory=lambda: [PRIMARY])
    schedule: Schedule = field(default_factory=Schedule)
    weight: float = 0.1
    seeds: int = 3
    baseline: str = "no alignment"
    train: int | None = None
    held_out: int | None = None
    layers: int = 7
    few_shot: list[int] = field(default_factory=list)
    arms: dict[str, Arm] = field(default_factory=dict)
    output: str = "runs/ablation"
    fold: int | None = None

    def __post_init__(self) -> None:
        if self.data not in ("furniture", "shapes"):
            raise ValueError(f"data={self.data!r}: expected furniture or shapes")
        if self.data == "shapes" and self.fold is not None:
            raise ValueError(f"fold={self.fold}: only data=furniture has folds")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is not an arm; arms: {', '.join(self.arms)}")
        if self.questions and self.data != "furniture":
            raise ValueError(f"questions: only data=furniture has annotations, got data={self.data}")
        if self.questions and min(self.questions.values()) <= 0:
            raise ValueError(f"questions={self.questions}: expected shares above 0")
        measured = [name for name in MEASURES if self.questions or name != GEOMETRY]
        if not self.primary or set(self.primary) - set(measured):
            raise ValueError(f"primary={self.primary}: expected of {', '.join(measured)}")
        if self.full_fine_tuning:
            self._check_full_fine_tuning()

    def _check_full_fine_tuning(self) -> None:
        expected = {"train": [], "lora_rank": 0, "dtype": "float32", "quantization": "none"}
        for name, value in expected.items():
            if (given := getattr(self.model, name)) != value:
                raise ValueError(f"full_fine_tuning needs model.{name}={value}, got {given}")
        if self.decoder is not None:
            raise ValueError("full_fine_tuning: a new decoder trains completely by itself, remove this option")

    def plan(self) -> list[tuple[str, int]]:
        """Runs (arm, seed) in order: arms with many seeds first, seed by seed, so that pairs finish together."""
        counts = {name: arm.seeds or self.seeds for name, arm in self.arms.items()}
        runs = [(name, seed) for name in self.arms for seed in range(counts[name])]
        return sorted(runs, key=lambda run: (-counts[run[0]], run[1]))


def read_recipe(name: str) -> Recipe:
    """A recipe from a YAML file or, by its name, from `experiments/recipes/<name>.yaml`.

    Raises:
        FileNotFoundError: there is no such recipe.
    """
    import yaml
    from jsonargparse import ArgumentParser

    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
    if not path.exists():
        shipped = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise FileNotFoundError(f"no recipe {name!r}: expected a YAML file or one of {', '.join(shipped)}")
    parser = ArgumentParser(prog="python -m experiments.ablation")
    parser.add_class_arguments(Recipe, "recipe")
    values = yaml.safe_load(path.read_text())
    return parser.instantiate(parser.parse_object({"recipe": values})).recipe
