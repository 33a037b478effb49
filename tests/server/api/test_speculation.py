"""`speculation` and `prediction`: what reaches the engine, what is refused, what `usage` tells of drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from scheduler.types import (
    Delta,
    FinishReason,
    Request,
    Speculation,
    SpeculationMode,
    SpeculationUsage,
    StepStats,
    VerifyMode,
)
from server.api.monitor import status_line
from server.metrics import StepTotals
from tests.server.api.fake_engine import MODEL_LEN
from tests.server.api.running import Server, serving
from tests.server.api.test_body import WRONG

DRAFTERS = (("prediction", False), ("suffix", False), ("draft_model", True))


def drafting(request: Request) -> Iterator[Delta | float]:
    """Two steps with drafts and one without."""
    yield Delta(request.id, cached_tokens=0)
    yield Delta(request.id, (104, 101), speculation=SpeculationUsage(3, 1, 1, 2, 1))
    yield Delta(request.id, (108,))
    yield Delta(
        request.id,
        (108, 111),
        finish_reason=FinishReason.LENGTH,
        speculation=SpeculationUsage(1, 1, 1, 1, 1),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(drafting) as running:
        running.engine.info = replace(running.engine.info, drafters=DRAFTERS, speculation="auto", max_drafts=6)
        yield running


def ask(server: Server, path: str = "/v1/completions", **fields: Any) -> Any:
    body = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return server.post(path, json={"model": "tiny", "max_tokens": 5, **body, **fields})


def submitted(server: Server, **fields: Any) -> Speculation:
    """What the engine was told of the request."""
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    return server.engine.requests[-1].speculation


def test_a_request_that_says_nothing_gets_the_servers_mode(server: Server) -> None:
    assert submitted(server) == Speculation()
    info = server.engine.info
    try:
        server.engine.info = replace(info, speculation="on")
        assert submitted(server).mode is SpeculationMode.ON
        assert submitted(server, speculation={"max_tokens": 2}).mode is SpeculationMode.ON
        assert submitted(server, speculation={"mode": "auto"}).mode is SpeculationMode.AUTO
    finally:
        server.engine.info = info


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_field_reaches_the_engine(server: Server, path: str) -> None:
    fields = {"mode": "on", "max_tokens": 6, "drafter": "suffix", "verify": "block", "tree": False, "quality": "exact"}
    assert ask(server, path, speculation=fields).status_code == 200
    wanted = Speculation(SpeculationMode.ON, 6, "suffix", VerifyMode.BLOCK, False)
    assert server.engine.requests[-1].speculation == wanted


def test_nulls_are_defaults(server: Server) -> None:
    assert submitted(server, speculation={"mode": None, "max_tokens": None, "tree": None}) == Speculation()
    assert submitted(server, speculation=None, prediction=None) == Speculation()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"speculation": {"k": 3}}, "speculation", "speculation has the unknown field k"),
        ({"speculation": {"mode": "fast"}}, "speculation", "speculation.mode: Input should be 'auto', 'on' or 'off'"),
        ({"speculation": {"mode": True}}, "speculation", "speculation.mode"),
        ({"speculation": {"max_tokens": 7}}, "speculation", "speculation.max_tokens is 7, but must be between 1 and 6"),
        ({"speculation": {"max_tokens": 0}}, "speculation", "must be between 1 and 6"),
        ({"speculation": {"max_tokens": 2.5}}, "speculation", "speculation.max_tokens"),
        ({"speculation": {"drafter": "eagle"}}, "speculation", "eagle, but this server has prediction, suffix, draft_"),
        ({"speculation": {"verify": "typical"}}, "speculation", "speculation.verify: Input should be 'coupled'"),
        ({"speculation": {"quality": "relaxed"}}, "speculation", "speculation.quality: Input should be 'exact'"),
        (
            {"speculation": {"tree": True, "verify": "rejection"}},
            "speculation",
            "speculation.tree is true and speculation.verify is rejection",
        ),
        (
            {"speculation": {"drafter": "suffix"}, "prediction": {"type": "content", "content": "x"}},
            "speculation",
            "prediction is given and speculation.drafter is suffix",
        ),
        ({"prediction": {"type": "content"}}, "prediction", "prediction.content: Field required"),
        (
            {"prediction": {"type": "tokens", "content": "x"}},
            "prediction",
            "prediction.type: Input should be 'content'",
        ),
        ({"prediction": {"type": "content", "content": "x", "weight": 1}}, "prediction", "the unknown field weight"),
        ({"prediction": {"type": "content", "content": [{"type": "image"}]}}, "prediction", "prediction.content"),
        (
            {"prediction": {"type": "content", "content": "x" * (MODEL_LEN + 1)}},
            "prediction",
            f"no output is longer than the context of {MODEL_LEN} tokens",
        ),
        (
            {"n": 16, "prediction": {"type": "content", "content": "x" * (MODEL_LEN - 1)}},
            "prediction",
            f"{MODEL_LEN - 1} tokens for each of 16 choices, the limit is {8 * MODEL_LEN} together",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(server: Server, fields: Any, param: str, message: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = ask(server, path, **fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert message in error["message"]


LEGAL_INSIDE: dict[str, dict[str, list[Any]]] = {
    "speculation": {"mode": [], "max_tokens": [], "drafter": [], "verify": [], "tree": [True], "quality": []},
    "prediction": {"type": [], "content": ["", "x", []]},
}


def test_every_wrong_value_inside_is_refused_by_the_name_of_the_field(server: Server) -> None:
    with server.client() as client:
        for param, fields in LEGAL_INSIDE.items():
            for name, legal in fields.items():
                for value in WRONG:
                    inside = {"type": "content", "content": "x"} if param == "prediction" else {}
                    body = {"model": "tiny", "prompt": "hi", "max_tokens": 2, param: {**inside, name: value}}
                    answer = client.post("/v1/completions", json=body)
                    is_legal = any(type(value) is type(item) and value == item for item in legal)
                    assert answer.status_code == (200 if is_legal else 400), (param, name, value, answer.text)
                    if not is_legal:
                        error = answer.json()["error"]
                        assert error["param"] == param
                        assert f"{param}.{name}" in error["message"]


@pytest.mark.parametrize("content", ["ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]])
def test_a_prediction_reaches_the_engine_as_tokens_for_each_choice(server: Server, content: Any) -> None:
    before = len(server.engine.requests)
    assert ask(server, n=2, prediction={"type": "content", "content": content}).status_code == 200
    ids = tuple(server.tokenizer.encode("ab", add_special_tokens=False))
    assert [request.speculation.prediction for request in server.engine.requests[before:]] == [ids, ids]


def test_mode_off_takes_no_prediction_along(server: Server) -> None:
    asked = {"speculation": {"mode": "off"}, "prediction": {"type": "content", "content": "ab"}}
    assert submitted(server, **asked) == Speculation(SpeculationMode.OFF)


def test_usage_is_summed_over_steps_and_choices(server: Server) -> None:
    usage = ask(server, n=3).json()["usage"]
    assert usage["speculation"] == {"drafted": 12, "accepted": 6, "steps": 6}
    assert "completion_tokens_details" not in usage


def test_the_typed_client_reads_prediction_counts_streamed_and_whole(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "prediction": {"type": "content", "content": "hello"},
        "extra_body": {"speculation": {"mode": "on", "drafter": "prediction"}},
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.accepted_prediction_tokens == 2
        assert usage.completion_tokens_details.rejected_prediction_tokens == 1
        assert usage.model_extra == {"speculation": {"drafted": 4, "accepted": 2, "steps": 2}}


def test_several_tokens_of_a_step_are_one_event_with_all_their_ids(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = client.completions.create(
        model="tiny", prompt="hi", max_tokens=5, stream=True, extra_body={"return_token_ids": True}
    )
    shown = [(chunk.choices[0].text, (chunk.choices[0].model_extra or {})["token_ids"]) for chunk in chunks]
    assert [ids for _, ids in shown] == [[104, 101], [108], [108, 111]]


def test_a_server_without_drafters_takes_hints_and_refuses_orders() -> None:
    with serving() as server:
        usage = ask(server).json()["usage"]
        assert "speculation" not in usage
        response = ask(server, prediction={"type": "content", "content": "x"}, speculation={"mode": "auto"})
        assert response.json()["usage"]["speculation"] == {"drafted": 0, "accepted": 0, "steps": 0}
        assert response.json()["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0
        refused = ask(server, speculation={"mode": "on"})
        assert refused.status_code == 400
        assert "this server runs without speculation" in refused.json()["error"]["message"]
        assert ask(server, speculation={"drafter": "suffix"}).status_code == 400


def test_a_server_whose_speed_is_made_up_says_so() -> None:
    with serving() as server:
        assert server.get("/version").json() == {"version": server.app.services.settings.version}
        server.engine.info = replace(server.engine.info, synthetic_acceptance=0.8)
        assert server.get("/version").json()["synthetic_acceptance"] == 0.8


def test_the_status_line_tells_of_drafts_where_there_were_any() -> None:
    before, after = StepTotals(), StepTotals(generated=100, drafted=40, accepted=30)
    assert "drafts=4/s accepted=75%" in (status_line(before, after, 10.0, StepStats()) or "")
    assert "drafts" not in (status_line(before, StepTotals(generated=100), 10.0, StepStats()) or "drafts")


def test_requests_that_get_no_drafts_are_counted_by_who_wanted_none(server: Server) -> None:
    def counted(reason: str) -> float:
        labels = {"model_name": "tiny", "reason": reason}
        return server.app.services.metrics.registry.get_sample_value("braid_spec_disabled_total", labels) or 0.0

    before = counted("request")
    assert ask(server).status_code == ask(server, speculation={"mode": "off"}).status_code == 200
    assert (counted("request") - before, counted("server")) == (1, 0)
