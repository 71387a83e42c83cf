"""Logs that hold what they must and nothing they must not; spans that reach a real collector."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry import trace

from services import telemetry
from services.telemetry import (
    WITHHELD,
    bind_request_id,
    configure_logging,
    configure_tracing,
    extract_context,
    get_logger,
    inject_context,
)
from tests.fakes.otlp_collector import otlp_collector

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_left_as_found() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_process_logger_and_request_id() -> None:
    configure_logging("edge", "info", stream := io.StringIO())
    with bind_request_id("req-1"):
        get_logger("edge.rest").info("request_admitted", num_tokens=3)
    get_logger("edge.rest").info("idle")
    first, second = logged(stream)
    expected = {
        "process": "edge",
        "logger": "edge.rest",
        "level": "info",
        "event": "request_admitted",
        "num_tokens": 3,
        "request_id": "req-1",
    }
    assert expected.items() <= first.items()
    assert str(first["timestamp"]).endswith("Z")
    assert "request_id" not in second


def test_lines_below_the_level_are_not_written() -> None:
    configure_logging("edge", "warning", stream := io.StringIO())
    get_logger("a").info("quiet")
    logging.getLogger("b").info("quiet")
    get_logger("a").warning("loud")
    assert [line["event"] for line in logged(stream)] == ["loud"]


def test_standard_logging_and_warnings_go_the_same_way() -> None:
    configure_logging("worker", "info", stream := io.StringIO())
    with bind_request_id("req-2"):
        logging.getLogger("uvicorn.error").warning("port %d", 80, extra={"peer": "a"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", UserWarning, stacklevel=1)
    line, warning = logged(stream)
    expected = {"process": "worker", "logger": "uvicorn.error", "event": "port 80", "request_id": "req-2", "peer": "a"}
    assert expected.items() <= line.items()
    assert "UserWarning: old" in str(warning["event"])


@pytest.mark.parametrize("key", ["prompt", "messages", "content", "text", "token_ids", "prompt_token_ids", "arguments"])
def test_what_bears_the_name_of_content_is_withheld(key: str) -> None:
    configure_logging("edge", "info", stream := io.StringIO())
    get_logger("a").info("seen", **{key: "secret"}, request={key: ["secret"]}, choices=[{key: "secret"}])
    logging.getLogger("b").info("seen", extra={key: "secret"})
    assert "secret" not in stream.getvalue()
    first, second = logged(stream)
    assert first[key] == WITHHELD and first["request"] == {key: WITHHELD} and first["choices"] == [{key: WITHHELD}]
    assert second[key] == WITHHELD


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["json", "terminal"])
def test_a_traceback_is_written_without_local_variables(stream: io.StringIO) -> None:
    configure_logging("edge", "info", stream)
    hidden = "sec" + "ret"
    try:
        raise ValueError("broken" * bool(hidden))
    except ValueError:
        get_logger("a").exception("failed")
    assert "ValueError: broken" in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_a_terminal_gets_plain_text() -> None:
    configure_logging("edge", "info", stream := Terminal())
    get_logger("a").info("hello")
    assert "hello" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_configuring_again_replaces_what_was_set() -> None:
    configure_logging("edge", "info", first := io.StringIO())
    configure_logging("edge", "info", second := io.StringIO())
    get_logger("a").info("hello")
    assert first.getvalue() == "" and len(logged(second)) == 1


def test_a_line_inside_a_span_names_its_trace() -> None:
    configure_logging("edge", "info", stream := io.StringIO())
    tracer = configure_tracing("edge", None).tracer
    with tracer.start_as_current_span("chat", extract_context({"traceparent": TRACEPARENT})):
        get_logger("a").info("hello")
    assert logged(stream)[0]["trace_id"] == TRACEPARENT.split("-")[1]


def test_shutdown_delivers_the_spans_that_wait_and_they_form_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "EXPORT_TIMEOUT_S", 60.0)
    with otlp_collector() as collector:
        with configure_tracing("edge", collector.endpoint) as edge, configure_tracing("scheduler", collector.endpoint) as scheduler:
            with edge.tracer.start_as_current_span("chat", attributes={"gen_ai.request.model": "nano"}):
                carrier = inject_context()
            scheduler.tracer.start_span("generate", extract_context(carrier)).end()
        spans = {span.name: span for span in collector.spans}
    chat, generate = spans["chat"], spans["generate"]
    assert (chat.service, generate.service) == ("ossia-edge", "ossia-scheduler")
    assert (generate.trace_id, generate.parent_span_id) == (chat.trace_id, chat.span_id)
    assert chat.parent_span_id == "" and chat.attributes == {"gen_ai.request.model": "nano"}


@pytest.mark.parametrize("endpoint", [None, ""])
def test_without_an_endpoint_nothing_is_recorded_but_a_callers_trace_is_passed_on(endpoint: str | None) -> None:
    with configure_tracing("edge", endpoint) as tracing:
        with tracing.tracer.start_as_current_span("chat") as span:
            assert not span.is_recording() and inject_context() == {}
        with tracing.tracer.start_as_current_span("chat", extract_context({"traceparent": TRACEPARENT})):
            assert inject_context() == {"traceparent": TRACEPARENT}


@pytest.mark.parametrize("carrier", [{}, {"traceparent": "nonsense"}, {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"}])
def test_a_context_that_is_absent_or_malformed_is_no_context(carrier: dict[str, str]) -> None:
    assert not trace.get_current_span(extract_context(carrier)).get_span_context().is_valid
