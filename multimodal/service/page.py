"""The service's own description: OpenAPI, and a page that shows it without anything from another host."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import FastAPI

from multimodal.service.schema import ChatRequest

REFERENCE = "#/components/schemas/"
CHAT = {  # the body is read by hand, so that errors have OpenAI's form
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"{REFERENCE}ChatRequest"}}},
    }
}

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title></head>
<body><main><h1>{title}</h1><p><a href="openapi.json">OpenAPI description</a></p>
{operations}
<h2>What is sent</h2>
{schemas}
</main></body></html>
"""


def describe(app: FastAPI) -> None:
    """Have an application's OpenAPI description tell the request's form, too."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        if "ChatRequest" not in schemas:
            schema = ChatRequest.model_json_schema(ref_template=f"{REFERENCE}{{model}}")
            schemas.update(schema.pop("$defs"))
            schemas["ChatRequest"] = schema
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def page_of(openapi: dict[str, Any]) -> str:
    """An HTML page of an OpenAPI description."""
    operations = "".join(
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(said.get('description', ''))}</p>"
        for path, methods in openapi["paths"].items()
        for method, said in methods.items()
    )
    schemas = "".join(
        f"<details><summary><code>{html.escape(name)}</code></summary>"
        f"<pre>{html.escape(json.dumps(schema, indent=2))}</pre></details>"
        for name, schema in openapi["components"]["schemas"].items()
    )
    return PAGE.format(title=html.escape(openapi["info"]["title"]), operations=operations, schemas=schemas)
