import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.ossia.v1 import sampling_pb2 as pb
from services import errors

KINDS = list(errors.TABLE)


@given(kind=st.sampled_from(KINDS), message=st.text(), param=st.text(), retry=st.none() | st.floats(0, 1e6))
def test_every_error_survives_the_wire(kind: type[errors.OssiaError], message: str, param: str, retry: float | None) -> None:
    back = errors.from_proto(errors.to_proto(kind(message, param, retry)))
    assert (type(back), back.message, back.param, back.retry_after_s) == (kind, message, param, retry)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_a_grpc_status(kind: type[errors.OssiaError]) -> None:
    raised = kind("say it again", "field", 1.5)
    details = ((errors.STATUS_DETAILS_KEY, errors.to_status(raised).SerializeToString()),)
    failure = grpc.aio.AioRpcError(errors.row(raised).grpc, grpc.aio.Metadata(), grpc.aio.Metadata(*details), "say it again")
    back = errors.from_rpc_error(failure)
    assert (type(back), back.message, back.param, back.retry_after_s) == (kind, "say it again", "field", 1.5)


@pytest.mark.parametrize("garbage", [b"", b"\xff\xff\xff", b"\x0a\x01"])
def test_a_status_without_our_details_is_read_by_its_code(garbage: bytes) -> None:
    trailers = grpc.aio.Metadata((errors.STATUS_DETAILS_KEY, garbage))
    failure = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, "connection refused")
    back = errors.from_rpc_error(failure)
    assert isinstance(back, errors.Unavailable) and back.message == "connection refused"


def test_the_table_names_every_code_of_the_contract_once() -> None:
    assert sorted(kind.code for kind in KINDS) == sorted(code for code in pb.ErrorCode.values() if code != pb.ERROR_CODE_UNSPECIFIED)


def test_an_unknown_code_of_a_newer_peer_is_internal() -> None:
    assert type(errors.from_proto(pb.Error(code=9999, message="new"))) is errors.Internal  # type: ignore[arg-type]  # what a newer peer may send


def test_the_openai_body_has_its_four_fields() -> None:
    body = errors.openai_body(errors.MissingField("messages is missing: give at least one", "messages"))
    assert body == {
        "error": {
            "message": "messages is missing: give at least one",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "missing_field",
        }
    }
