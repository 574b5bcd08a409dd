"""The HTTP API: routes, schemas, errors and the OpenAPI description."""
