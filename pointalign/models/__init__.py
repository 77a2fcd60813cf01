"""The model, its configuration and its processor, registered with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from pointalign.models.configuration import PointAlignConfig, PointBertConfig
from pointalign.models.modeling import PointAlignForConditionalGeneration, PointAlignModel, PointFeatures
from pointalign.models.phi import PointAlignPhiConfig, PointAlignPhiForCausalLM
from pointalign.models.point_encoder import PointBertModel
from pointalign.models.processing import PointAlignFeatureExtractor, PointAlignProcessor

AutoConfig.register("pointalign_pointbert", PointBertConfig)
AutoModel.register(PointBertConfig, PointBertModel)
AutoConfig.register("pointalign_phi", PointAlignPhiConfig)
AutoModelForCausalLM.register(PointAlignPhiConfig, PointAlignPhiForCausalLM)
AutoConfig.register("pointalign", PointAlignConfig)
AutoModel.register(PointAlignConfig, PointAlignModel)
AutoModelForMultimodalLM.register(PointAlignConfig, PointAlignForConditionalGeneration)
AutoFeatureExtractor.register(PointAlignConfig, PointAlignFeatureExtractor)
AutoProcessor.register(PointAlignConfig, PointAlignProcessor)

__all__ = [
    "PointAlignConfig",
    "PointAlignFeatureExtractor",
    "PointAlignForConditionalGeneration",
    "PointAlignModel",
    "PointAlignPhiConfig",
    "PointAlignPhiForCausalLM",
    "PointAlignProcessor",
    "PointBertConfig",
    "PointBertModel",
    "PointFeatures",
]
