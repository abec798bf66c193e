"""The routes that load and drop adapters while the server runs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.serving.errors import forbidden, invalid
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.openai_api import JSONAnswer, view_of, visit_of
from sartor.serving.openai_responses import DroppedAdapter, LoadedAdapter
from sartor.serving.openai_types import LoadAdapterRequest, UnloadAdapterRequest
from sartor.serving.openapi import operation
from sartor.serving.prepare import find_model


def add_adapter_routes(router: APIRouter, gateway: Gateway, intake: Intake) -> None:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; for admins, where there are keys."""

    @router.post(
        "/v1/load_lora_adapter", openapi_extra=operation(LoadedAdapter, body=LoadAdapterRequest)
    )
    async def load_adapter(request: Request) -> Response:
        _only_admins(request)
        body = await intake.parsed(request, LoadAdapterRequest, visit_of(request))
        base = body.base_model_name
        if base is None:
            if len(gateway.models) > 1:
                raise invalid(
                    "base_model_name: several models are served; name the adapter's",
                    "base_model_name",
                )
            base = next(iter(gateway.models))
        found = find_model(gateway.models, base, view_of(request, intake.limits), "text")
        if found.adapter or found.preset:
            what = "an adapter itself" if found.adapter else "a preset"
            raise invalid(
                f"base_model_name: {base!r} is {what}; name its model, {found.model.name}",
                "base_model_name",
            )
        model = found.model
        await gateway.adapters.load(model, body.lora_name, body.lora_path)
        return JSONAnswer({"object": "adapter", "id": body.lora_name, "parent": model.name})

    @router.post(
        "/v1/unload_lora_adapter",
        openapi_extra=operation(DroppedAdapter, body=UnloadAdapterRequest),
    )
    async def unload_adapter(request: Request) -> Response:
        _only_admins(request)
        body = await intake.parsed(request, UnloadAdapterRequest, visit_of(request))
        gateway.drop_adapter(body.lora_name)
        return JSONAnswer({"object": "adapter", "id": body.lora_name, "deleted": True})


def _only_admins(request: Request) -> None:
    key = visit_of(request).key
    if not key.admin:
        raise forbidden(
            f"the key {key.name} may not load or unload adapters; its entry in the keys file "
            "needs admin = true"
        )
