"""Exceptions that cross processes, and the one table that says what each is called in gRPC, in HTTP and in OpenAI's API.

A process raises `OssiaError`; the gRPC server and the REST door translate it at their border, and the peer's client turns it back.
"""

from typing import ClassVar, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from protos.ossia.v1 import sampling_pb2 as pb

ERROR_DOMAIN = "ossia"
STATUS_DETAILS_KEY = "grpc-status-details-bin"  # where the field's libraries look for google.rpc.Status


class OssiaError(Exception):
    """Something that a caller or a peer can cause, or that it must know of.

    `message` is one sentence that names the field and the cure, `param` the request field at fault ("" for none), `retry_after_s` the
    seconds after which the same request may succeed (None: not known).
    """

    code: ClassVar[pb.ErrorCode.ValueType] = pb.ERROR_CODE_INTERNAL

    def __init__(self, message: str, param: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidArgument(OssiaError):
    code = pb.ERROR_CODE_INVALID_ARGUMENT


class MissingField(OssiaError):
    code = pb.ERROR_CODE_MISSING_FIELD


class ModelNotFound(OssiaError):
    code = pb.ERROR_CODE_MODEL_NOT_FOUND


class ContextLengthExceeded(OssiaError):
    code = pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED


class PayloadTooLarge(OssiaError):
    code = pb.ERROR_CODE_PAYLOAD_TOO_LARGE


class Unauthenticated(OssiaError):
    code = pb.ERROR_CODE_UNAUTHENTICATED


class PermissionDenied(OssiaError):
    code = pb.ERROR_CODE_PERMISSION_DENIED


class NotFound(OssiaError):
    code = pb.ERROR_CODE_NOT_FOUND


class Unsupported(OssiaError):
    code = pb.ERROR_CODE_UNSUPPORTED


class RateLimited(OssiaError):
    code = pb.ERROR_CODE_RATE_LIMITED


class Overloaded(OssiaError):
    code = pb.ERROR_CODE_OVERLOADED


class Unavailable(OssiaError):
    code = pb.ERROR_CODE_UNAVAILABLE


class GroupLost(OssiaError):
    code = pb.ERROR_CODE_GROUP_LOST


class DeadlineExceeded(OssiaError):
    code = pb.ERROR_CODE_DEADLINE_EXCEEDED


class Cancelled(OssiaError):
    code = pb.ERROR_CODE_CANCELLED


class StaleEpoch(OssiaError):
    code = pb.ERROR_CODE_STALE_EPOCH


class UnknownSequence(OssiaError):
    code = pb.ERROR_CODE_UNKNOWN_SEQUENCE


class BlockOutOfRange(OssiaError):
    code = pb.ERROR_CODE_BLOCK_OUT_OF_RANGE


class InvalidPlan(OssiaError):
    code = pb.ERROR_CODE_INVALID_PLAN


class InvalidLogits(OssiaError):
    code = pb.ERROR_CODE_INVALID_LOGITS


class ConstraintFailed(OssiaError):
    code = pb.ERROR_CODE_CONSTRAINT_FAILED


class Internal(OssiaError):
    code = pb.ERROR_CODE_INTERNAL


class Row(NamedTuple):
    """One error's names: gRPC status, HTTP status, and OpenAI's `code` and `type`."""

    grpc: grpc.StatusCode
    http: int
    code: str
    type: str


_BAD, _AUTH, _SERVER = "invalid_request_error", "authentication_error", "server_error"
_G = grpc.StatusCode
TABLE: dict[type[OssiaError], Row] = {
    InvalidArgument: Row(_G.INVALID_ARGUMENT, 400, "invalid_value", _BAD),
    MissingField: Row(_G.INVALID_ARGUMENT, 400, "missing_field", _BAD),
    ModelNotFound: Row(_G.NOT_FOUND, 404, "model_not_found", _BAD),
    ContextLengthExceeded: Row(_G.INVALID_ARGUMENT, 400, "context_length_exceeded", _BAD),
    PayloadTooLarge: Row(_G.RESOURCE_EXHAUSTED, 413, "payload_too_large", _BAD),
    Unauthenticated: Row(_G.UNAUTHENTICATED, 401, "invalid_api_key", _AUTH),
    PermissionDenied: Row(_G.PERMISSION_DENIED, 403, "permission_denied", "permission_error"),
    NotFound: Row(_G.NOT_FOUND, 404, "not_found", _BAD),
    Unsupported: Row(_G.UNIMPLEMENTED, 400, "unsupported_value", _BAD),
    RateLimited: Row(_G.RESOURCE_EXHAUSTED, 429, "rate_limit_exceeded", "rate_limit_error"),
    Overloaded: Row(_G.RESOURCE_EXHAUSTED, 429, "overloaded", "rate_limit_error"),
    Unavailable: Row(_G.UNAVAILABLE, 503, "unavailable", _SERVER),
    GroupLost: Row(_G.UNAVAILABLE, 503, "group_lost", _SERVER),
    DeadlineExceeded: Row(_G.DEADLINE_EXCEEDED, 504, "deadline_exceeded", _SERVER),
    Cancelled: Row(_G.CANCELLED, 499, "cancelled", _BAD),
    StaleEpoch: Row(_G.FAILED_PRECONDITION, 409, "stale_epoch", _SERVER),
    UnknownSequence: Row(_G.FAILED_PRECONDITION, 500, "unknown_sequence", _SERVER),
    BlockOutOfRange: Row(_G.OUT_OF_RANGE, 500, "block_out_of_range", _SERVER),
    InvalidPlan: Row(_G.FAILED_PRECONDITION, 500, "invalid_plan", _SERVER),
    InvalidLogits: Row(_G.INTERNAL, 500, "invalid_logits", _SERVER),
    ConstraintFailed: Row(_G.INTERNAL, 500, "constraint_failed", _SERVER),
    Internal: Row(_G.INTERNAL, 500, "internal_error", _SERVER),
}
_BY_CODE = {error.code: error for error in TABLE}
_CODE_NAMES = frozenset(pb.ErrorCode.keys())
_BY_STATUS: dict[grpc.StatusCode, type[OssiaError]] = {
    _G.CANCELLED: Cancelled,
    _G.DEADLINE_EXCEEDED: DeadlineExceeded,
    _G.UNAVAILABLE: Unavailable,
    _G.RESOURCE_EXHAUSTED: Overloaded,
    _G.INVALID_ARGUMENT: InvalidArgument,
    _G.UNIMPLEMENTED: Unsupported,
    _G.NOT_FOUND: NotFound,
    _G.UNAUTHENTICATED: Unauthenticated,
    _G.PERMISSION_DENIED: PermissionDenied,
}


def row(error: OssiaError) -> Row:
    """The error's names; a subclass that is not in the table is INTERNAL."""
    return TABLE.get(type(error), TABLE[Internal])


def http_status(error: OssiaError) -> int:
    return row(error).http


def openai_body(error: OssiaError) -> dict[str, dict[str, str | None]]:
    """OpenAI's error body."""
    names = row(error)
    return {"error": {"message": error.message, "type": names.type, "param": error.param or None, "code": names.code}}


def to_proto(error: OssiaError) -> pb.Error:
    return pb.Error(code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s)


def from_proto(error: pb.Error) -> OssiaError:
    """The exception for a typed error; a code of a newer peer becomes INTERNAL."""
    kind = _BY_CODE.get(error.code, Internal)
    return kind(error.message, error.param, error.retry_after_s if error.HasField("retry_after_s") else None)


def to_status(error: OssiaError) -> status_pb2.Status:
    """The rich status that every gRPC library reads: ErrorInfo with our code, and RetryInfo where a time is known."""
    status = status_pb2.Status(code=row(error).grpc.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=pb.ErrorCode.Name(error.code), domain=ERROR_DOMAIN, metadata={"param": error.param})
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return status


def from_rpc_error(failure: grpc.aio.AioRpcError) -> OssiaError:
    """The exception that a peer raised, or the nearest one for a failure of the call itself."""
    kind = _BY_STATUS.get(failure.code(), Internal)
    message, param, retry_after_s = failure.details() or failure.code().name, "", None
    for key, value in failure.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            kind, param, retry_after_s = _read_details(value, kind)
    return kind(message, param, retry_after_s)


def _read_details(serialized: bytes, fallback: type[OssiaError]) -> tuple[type[OssiaError], str, float | None]:
    kind, param, retry_after_s = fallback, "", None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    try:
        details = status_pb2.Status.FromString(serialized).details
    except DecodeError:
        return fallback, "", None
    for detail in details:
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN and info.reason in _CODE_NAMES:
            kind, param = _BY_CODE.get(pb.ErrorCode.Value(info.reason), Internal), info.metadata["param"]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return kind, param, retry_after_s
