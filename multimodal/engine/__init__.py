"""Runs a fused model fast: continuous batching over a static cache, pictures encoded once, several precisions."""

from multimodal.engine.engine import Engine
from multimodal.engine.pictures import LeastRecentlyUsed, digest_of
from multimodal.engine.precisions import DTYPES, make_runner
from multimodal.engine.requests import EngineClosed, EngineError, EngineFull, Generation, Picture, Request, Token

__all__ = [
    "DTYPES",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineFull",
    "Generation",
    "LeastRecentlyUsed",
    "Picture",
    "Request",
    "Token",
    "digest_of",
    "make_runner",
]
