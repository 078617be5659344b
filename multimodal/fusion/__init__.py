"""The fused model: tensors only. It knows no data set, no server, and imports nothing else of ours."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from multimodal.fusion.cache import FusionCache
from multimodal.fusion.configuration import FusionConfig
from multimodal.fusion.cross_attention import GatedCrossAttentionBlock
from multimodal.fusion.gates import DynamicGate, TanhGate
from multimodal.fusion.modeling import FusionForConditionalGeneration, FusionModel
from multimodal.fusion.processing import FusionProcessor
from multimodal.fusion.resampler import RegionResampler
from multimodal.fusion.trace import FusionTrace
from multimodal.fusion.vision import VisionConfig, VisionEncoder

__all__ = [
    "DynamicGate",
    "FusionCache",
    "FusionConfig",
    "FusionForConditionalGeneration",
    "FusionModel",
    "FusionProcessor",
    "FusionTrace",
    "GatedCrossAttentionBlock",
    "RegionResampler",
    "TanhGate",
    "VisionConfig",
    "VisionEncoder",
]

AutoConfig.register(VisionConfig.model_type, VisionConfig, exist_ok=True)
AutoModel.register(VisionConfig, VisionEncoder, exist_ok=True)
AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
AutoModel.register(FusionConfig, FusionModel, exist_ok=True)
AutoModelForImageTextToText.register(FusionConfig, FusionForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FusionConfig, FusionProcessor, exist_ok=True)
