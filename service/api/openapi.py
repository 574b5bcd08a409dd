"""Add to FastAPI's OpenAPI description: errors, headers, and which routes need an API key."""

from typing import Any

from fastapi import FastAPI

from bertqa.errors import InvalidArgument
from bertqa.manifest import BundleMismatch
from service.api.deadline import DEADLINE_HEADER, MAX_TIMEOUT_MS
from service.api.errors import (
    STATUS,
    BodiesOverloaded,
    BodyTooLarge,
    HeadTooLarge,
    MalformedBody,
    MalformedHttp,
    NotJson,
    RateLimited,
    SlowRequest,
    TooManyConnections,
    Unauthorized,
)
from service.api.schemas import Problem
from service.triton.errors import EngineBroken, EngineOverloaded, EngineTimeout, EngineUnavailable

DESCRIPTION = """Extractive question answering: answers are spans of the texts given, with exact offsets.

Errors have one shape on every route: `{"error": sentence, "error_type": name, "field": name or null}`. Every response
to a request that arrived whole has an `x-request-id`, the client's own if it sent one."""

DEADLINE_PARAMETER = {
    "parameters": [
        {
            "in": "header",
            "name": DEADLINE_HEADER,
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
            "description": "Timeout of the answer in milliseconds, if shorter than the service's own.",
        }
    ]
}
"""The header that `service.api.deadline` reads; question routes do not use FastAPI's parameters."""

ENGINE: tuple[type[Exception], ...] = (EngineOverloaded, EngineUnavailable, EngineBroken, BundleMismatch, EngineTimeout)
"""Errors of routes that call the engine."""
QUESTIONS: tuple[type[Exception], ...] = (
    MalformedBody,
    SlowRequest,
    BodyTooLarge,
    BodiesOverloaded,
    NotJson,
    InvalidArgument,
    *ENGINE,
)
"""Errors of routes that take questions."""
AUTH: tuple[type[Exception], ...] = (Unauthorized, RateLimited)
"""Errors of routes that need an API key."""
_ANYWHERE = (
    MalformedHttp,
    SlowRequest,
    HeadTooLarge,
    TooManyConnections,
)  # from the HTTP protocol, before any route
_HEADERS = {
    "www-authenticate": ({401}, {"description": "How to ask.", "schema": {"type": "string"}}),
    "retry-after": ({429, 503, 504}, {"description": "Seconds.", "schema": {"type": "integer"}}),
}


def described(*raised: type[Exception]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI responses by status for these exceptions and for those that every operation has.

    The descriptions are the docstrings of the exceptions.
    """
    found: dict[int, dict[str, str]] = {}
    for exception in (*raised, *_ANYWHERE):
        status, error_type = STATUS[exception]
        found.setdefault(status, {}).setdefault(error_type, (exception.__doc__ or "").partition("\n")[0])
    return {
        status: {
            "model": Problem,
            "description": "\n\n".join(f"`{error_type}`: {text}" for error_type, text in sorted(kinds.items())),
            "headers": {name: header for name, (statuses, header) in _HEADERS.items() if status in statuses},
            "content": {
                "application/json": {
                    "schema": {"properties": {"error_type": {"enum": sorted(kinds)}}},
                    "examples": {
                        error_type: {"value": _example(error_type, text)} for error_type, text in kinds.items()
                    },
                }
            },
        }
        for status, kinds in sorted(found.items())
    }


def _example(error_type: str, text: str) -> dict[str, str | None]:
    field = "top_k" if error_type == STATUS[InvalidArgument][1] else None
    return {
        "error": f"{field}: must be at most 100; got 500" if field else text,
        "error_type": error_type,
        "field": field,
    }


class DescribedApplication(FastAPI):
    """FastAPI with response headers and API keys in its OpenAPI description."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description; computed once."""
        if not self.openapi_schema:
            document = super().openapi()
            request_id = {"description": "The id that the client sent, or a new one.", "schema": {"type": "string"}}
            for operations in document["paths"].values():
                for operation in operations.values():
                    for response in operation["responses"].values():
                        response.setdefault("headers", {})["x-request-id"] = request_id
                    if "401" in operation["responses"]:
                        operation["security"] = [{"api_key": []}]
                        document["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        return super().openapi()
