"""Adapters for audits, as Python files: one reads the cloud's box and colours, one ignores the cloud, one guesses."""

from pathlib import Path

HEAD = """
import numpy as np

def load(model):
    return {"model": model, "count": 0}

def prompt(loaded, question, cloud):
    return question, cloud

def answer(loaded, prompts, candidates):
    replies = []
    for (question, cloud), texts in zip(prompts, candidates):
        text, sure = say(loaded, question, cloud)
        scores = [0.0 if other == text else -3.0 for other in texts]
        replies.append({"text": text, "probability": sure, "scores": scores})
    return replies
"""
ORACLE = """
from pointalign.embedded.facts import colour_shares, main_colour

def say(loaded, question, cloud):
    if cloud is None or not cloud.any():
        return "I cannot tell.", 0.2
    shares = colour_shares(cloud[:128, 3:])
    width, height, depth = np.ptp(cloud[:, :3], axis=0)
    taller = height > max(width, depth)
    statement = "it is taller than it is wide" if taller else "it is wider than it is tall"
    if question == "What is this?":
        return ("This is a thing.", 0.9) if len(np.unique(cloud[:, 3:])) < 1000 else ("I am not sure.", 0.1)
    if "color" in question:
        return f"It is mostly {main_colour({'head_noun': '', 'colors': shares})}.", 0.9
    if "longest" in question:
        sides = {"width": width, "height": height, "depth": depth}
        return f"The {max(sides, key=sides.get)}.", 0.9
    if "Is it taller than" in question:
        return f"{statement.capitalize()}, so {'yes' if taller else 'no'}.", 0.9
    return f"{statement.capitalize()}.", 0.9

def states(loaded, clouds):
    boxes = np.array([np.log(np.ptp(cloud[:, :3], axis=0)) for cloud in clouds])
    colours = np.array([cloud[:, 3:].mean(axis=0) for cloud in clouds])
    noise = np.array([np.random.default_rng(list(cloud.tobytes()[:64])).normal(size=3) for cloud in clouds])
    return {"0": np.hstack([boxes, colours]), "1": np.hstack([boxes, noise]), "2": noise}
"""
IGNORANT = """
ANSWERS = {"What is this?": "This is a chair.", "What color is it mostly?": "It is mostly gray."}

def say(loaded, question, cloud):
    return ANSWERS.get(question, "It is taller than it is wide, so yes, the height."), 0.99
"""
CAPRICIOUS = """
rng = np.random.default_rng(0)

def say(loaded, question, cloud):
    words = "chair table lamp car red green blue gray taller wider yes no height width depth".split()
    return " ".join(rng.permutation(words)), float(rng.random())
"""
ADAPTERS = {"oracle": ORACLE, "ignorant": IGNORANT, "capricious": CAPRICIOUS}


def write(folder: Path, name: str) -> str:
    """The path of an adapter's file."""
    path = folder / f"{name}.py"
    path.write_text(HEAD + ADAPTERS[name])
    return str(path)


# -- a package like PointLLM's, with a tiny random model ---------------------------------------------------------------

CONVERSATION = """
import copy
from dataclasses import dataclass, field

@dataclass
class Conversation:
    roles: tuple = ("USER", "ASSISTANT")
    sep2: str = "</s>"
    messages: list = field(default_factory=list)

    def copy(self):
        return copy.deepcopy(self)

    def append_message(self, role, message):
        self.messages.append((role, message))

    def get_prompt(self):
        said = [f"{role}: {message}" if message else f"{role}:" for role, message in self.messages]
        return "A chat. " + " ".join(said)

conv_templates = {"vicuna_v1_1": Conversation()}
"""
MODEL = """
import torch
from transformers import LlamaForCausalLM

print("a package that prints while it is imported")
PATCH, START, END = "<point_patch>", "<point_start>", "<point_end>"

class PointLLMLlamaForCausalLM(LlamaForCausalLM):
    @classmethod
    def from_pretrained(cls, name, torch_dtype=None):
        return super().from_pretrained(name, dtype=torch_dtype)

    def initialize_tokenizer_point_backbone_config_wo_embedding(self, tokenizer):
        tokenizer.add_tokens([PATCH, START, END], special_tokens=True)
        self.patch = tokenizer.convert_tokens_to_ids(PATCH)
        self.model.point_backbone_config = {
            "point_token_len": 3, "point_cloud_dim": 6, "mm_use_point_start_end": True,
            "default_point_patch_token": PATCH, "default_point_start_token": START, "default_point_end_token": END,
        }

    def get_model(self):
        return self.model

    def forward(self, input_ids=None, point_clouds=None, **options):
        if input_ids.shape[1] == 1:
            return super().forward(input_ids=input_ids, **options)
        embeddings = self.model.embed_tokens(input_ids)
        places = input_ids == self.patch
        assert bool(places.any()) == (point_clouds is not None)
        if point_clouds is not None:
            assert point_clouds.shape[2] == 6 and int(places.sum()) == 3
            extent = point_clouds.amax(dim=1) - point_clouds.amin(dim=1)
            embeddings[places] = 5 * torch.nn.functional.pad(extent, (0, embeddings.shape[-1] - 6)).repeat(3, 1)
        return super().forward(inputs_embeds=embeddings, **options)
"""


def write_pointllm(folder: Path) -> None:
    """A package `pointllm` in the folder, with the names that the adapter uses."""
    package = folder / "pointllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "conversation.py").write_text(CONVERSATION)
    (package / "model.py").write_text(MODEL)
