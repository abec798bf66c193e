"""Errors as the OpenAI API shapes them: status, message, type, param, code."""

from __future__ import annotations

from sartor.errors import SartorError


class ApiError(SartorError):
    """An answer that is an error. ``retry_after`` seconds goes out as the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    return ApiError(
        400, f"{param}: {what}, which is not supported yet", param=param, code="unsupported"
    )


def model_not_found(name: str, known: list[str]) -> ApiError:
    return ApiError(
        404,
        f"the model {name!r} is not served here; served are {', '.join(known)}",
        param="model",
        code="model_not_found",
    )


def context_exceeded(prompt: int, context: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"the prompt has {prompt} tokens, but the model's context length is {context} tokens and "
        "must hold at least one token of the answer too; shorten the prompt",
        param=param,
        code="context_length_exceeded",
    )


def overloaded(limit: int) -> ApiError:
    return ApiError(
        429,
        f"the server has its fill of {limit} unfinished requests; try again in a moment",
        type="rate_limit_error",
        code="queue_full",
        retry_after=1,
    )


def unavailable(message: str, retry_after: int | None = None) -> ApiError:
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code="service_unavailable",
        retry_after=retry_after,
    )


def internal(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")
