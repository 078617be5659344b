"""The service: a model behind an endpoint that speaks as OpenAI's does, for programs on this machine."""

from __future__ import annotations

try:
    from multimodal.service.app import create_app
    from multimodal.service.logs import AuditLog, RequestLog
    from multimodal.service.server import check_address, serve, serving
    from multimodal.service.settings import ServiceSettings
except ModuleNotFoundError as error:
    if error.name not in (
        "fastapi",
        "prometheus_client",
        "pydantic",
        "sqlalchemy",
        "sqlmodel",
        "starlette",
        "structlog",
        "uvicorn",
    ):
        raise
    raise ImportError(
        f"the service needs {error.name}, which is not installed: pip install 'multimodal[service]'"
    ) from None

__all__ = ["AuditLog", "RequestLog", "ServiceSettings", "check_address", "create_app", "serve", "serving"]
