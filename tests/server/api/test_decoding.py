"""`decoding`: which names denoise, what reaches the engine, what is refused, what `usage` and snapshots tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from scheduler.policies import POLICIES, SELECTORS, WITH_QUOTA, make_diffusion
from scheduler.types import (
    EosRule,
    SpeculationMode,
)
from server.api.facts import served_names
from server.api.settings import ApiSettings
from tests.server.api.denoising import BC, CANVAS, DUAL, FB, ONLY, PATHS, ask, denoised, denoising, refused, submitted
from tests.server.api.fake_engine import MODEL_LEN, byte_tokenizer
from tests.server.api.running import Server, make_app, serving


@pytest.fixture(scope="module")
def dual() -> Iterator[Server]:
    with serving(denoising, diffusion=DUAL) as running:
        yield running


@pytest.fixture(scope="module")
def canvas() -> Iterator[Server]:
    with serving(denoising, diffusion=CANVAS) as running:
        yield running


@pytest.mark.parametrize("path", PATHS)
def test_a_dual_model_answers_under_two_names(dual: Server, path: str) -> None:
    listed = dual.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "tiny-diffusion"]
    assert listed[0]["decoding"] == {"policy": "autoregressive"}
    assert listed[1]["decoding"] == {"policy": "auto", "topology": "block_causal", "block_size": 8}
    assert dual.get("/v1/models/tiny-diffusion").json() == listed[1]
    for name, wanted in (("tiny", None), (None, None), ("tiny-diffusion", make_diffusion("auto", BC))):
        answer = ask(dual, path, model=name).json()
        assert dual.engine.requests[-1].decoding == wanted
        assert answer["model"] == ("tiny" if wanted is None else "tiny-diffusion")
    assert ask(dual, path, model="tiny-diffusio").status_code == 404


@pytest.mark.parametrize("name", ["tiny", "tiny-diffusion"])
def test_a_policy_named_expressly_wins_over_the_name(dual: Server, name: str) -> None:
    assert submitted(dual, model=name, decoding={"policy": "autoregressive"}).decoding is None
    assert denoised(dual, model=name, decoding={"policy": "threshold"}) == make_diffusion("threshold", BC)
    assert denoised(dual, model=name, decoding={"threshold": 0.5}).selector["threshold"] == 0.5


def test_every_served_name_has_its_second() -> None:
    with serving(denoising, ApiSettings(("a", "b")), diffusion=DUAL) as server:
        ids = [card["id"] for card in server.get("/v1/models").json()["data"]]
        assert ids == ["a", "b", "a-diffusion", "b-diffusion"]
        assert submitted(server, model="b-diffusion").decoding is not None
        assert submitted(server, model="b").decoding is None
    with pytest.raises(ValueError, match="served-model-name is a-diffusion"):
        served_names(("a", "a-diffusion"), DUAL)
    assert served_names(("a-diffusion",), ONLY) == served_names(("a-diffusion",), None) == ("a-diffusion",)


def test_a_model_that_only_denoises_does_so_under_its_name() -> None:
    with serving(denoising, diffusion=replace(ONLY, policy="sdar_static")) as server:
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["tiny"]
        assert denoised(server) == make_diffusion("sdar_static", BC)
        assert ask(server).json()["model"] == "tiny"
        param, message = refused(server, decoding={"policy": "autoregressive"})
        assert param == "decoding.policy"
        assert "this model can only denoise" in message
        assert server.get("/health/generate").status_code == 200
        assert server.engine.requests[-1].decoding == make_diffusion("sdar_static", BC)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_cannot_denoise_refuses_to(path: str) -> None:
    with serving(denoising) as server:
        for value in ({}, {"policy": "auto"}, {"steps": 4}, {"policy": "autoregressive", "steps": 4}):
            param, message = refused(server, path, decoding=value)
            assert param == "decoding"
            assert "generates token by token only" in message
        assert ask(server, path, decoding={"policy": "autoregressive"}).status_code == 200
        assert ask(server, path, decoding=None).status_code == 200
        assert "decoding" not in ask(server, path).json()["usage"]
        assert refused(server, "/v1/denoise/stream")[0] == "model"


@pytest.mark.parametrize("path", PATHS)
def test_every_policy_of_the_topology_can_be_had_by_name(dual: Server, canvas: Server, path: str) -> None:
    for server, topology in ((dual, BC), (canvas, FB)):
        for name, policy in POLICIES.items():
            response = ask(server, path, decoding={"policy": name})
            if name == "llada2_edit" and server is dual:
                assert "selector is edit" in response.json()["error"]["message"]
            elif policy.topology in (None, topology):
                assert response.status_code == 200, (name, response.text)
                wanted = make_diffusion(name, topology)
                assert server.engine.requests[-1].decoding == replace(
                    wanted, delimiters=(198,) if wanted.planner.name == "adablock" else ()
                )
            else:
                assert response.json()["error"]["param"] == "decoding.policy"
                assert f"which is for {policy.topology} models" in response.json()["error"]["message"]


def test_every_field_reaches_the_engine(canvas: Server) -> None:
    asked = {
        "policy": "threshold", "selector": "dynamic", "planner": "dsb", "cache": "elastic", "stopper": "prophet",
        "threshold": 0.7, "first": 2, "elastic.drift": 0.5, "cache.width": 8, "early": 3, "steps": 4,
        "block_size": 16, "gen_length": 32, "confidence": "filtered", "eos": "last",
    }  # fmt: skip
    del asked["elastic.drift"]
    parts = {"selector": "dynamic", "planner": "dsb", "cache": "elastic", "stopper": "prophet"}
    values = {"threshold": 0.7, "first": 2, "cache.width": 8, "early": 3}
    wanted = make_diffusion(
        "threshold", FB, parts, values, steps=4, block_size=16, gen_length=32, filtered=True, eos=EosRule.LAST
    )
    assert denoised(canvas, decoding=asked) == wanted


def test_what_the_weights_were_not_trained_for_is_refused(dual: Server) -> None:
    found = refused(dual, decoding={"policy": "threshold", "selector": "edit"})
    assert found[0] == "decoding.selector"
    assert "this model's tokens answer for the next one" in found[1]
    with serving(denoising, diffusion=ONLY) as server:
        found = refused(server, decoding={"policy": "learn2pd"})
        assert found[0] == "decoding.selector"
        assert "needs a filter for blocks of 8; this model has none" in found[1]
        assert denoised(server, decoding={"policy": "llada2_edit"}).selector.name == "edit"


def test_nulls_are_defaults(dual: Server) -> None:
    assert submitted(dual, decoding={"policy": None, "steps": None, "eos": None}).decoding is None
    assert denoised(dual, model="tiny-diffusion", decoding={}) == make_diffusion("auto", BC)


def test_drafts_are_off_where_it_denoises_and_a_prediction_is_a_hint(dual: Server) -> None:
    info = dual.engine.info
    try:
        dual.engine.info = replace(info, drafters=(("prediction", False),), speculation="on")
        request = submitted(
            dual, model="tiny-diffusion", prediction={"type": "content", "content": "x"}, speculation={"mode": "auto"}
        )
        assert request.speculation.mode is SpeculationMode.OFF
        assert request.speculation.prediction == ()
        assert "speculation" not in ask(dual, model="tiny-diffusion").json()["usage"]
        assert submitted(dual, model="tiny").speculation.mode is SpeculationMode.ON
    finally:
        dual.engine.info = info


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"policy": "fast"}, "decoding.policy", "decoding.policy is fast, but must be one of autoregressive, auto,"),
    ({"policy": 1}, "decoding.policy", "decoding.policy: Input should be a valid string"),
    ({"policy": "prefix"}, "decoding.policy", "which is for bidirectional models; this one is block_causal"),
    ({"policy": "autoregressive", "steps": 2}, "decoding.steps", "decoding.policy is autoregressive"),
    ({"policy": "autoregressive", "foo": 2}, "decoding.foo", "decoding has the unknown field foo"),
    ({"selector": "best"}, "decoding.selector", "decoding.selector is best, but must be one of auto, sequential,"),
    ({"planner": "x" * 900}, "decoding.planner", "but must be one of fixed, sub_blocks"),
    ({"cache": "dual"}, "decoding.cache", "cache is dual, which is for bidirectional models"),
    ({"cache": "sub_block"}, "decoding.cache", "goes with planner sub_blocks, not fixed"),
    ({"stopper": "never"}, "decoding.stopper", "decoding.stopper is never, but must be one of eos, eotp, prophet"),
    ({"policy": "wino", "stopper": "eotp"}, "decoding.selector", "selector is wino, which goes with no approximate"),
    ({"foo": 1}, "decoding.foo", "decoding has the unknown field foo"),
    ({"foo": "x"}, "decoding.foo", "decoding has the unknown field foo"),
    ({"threshold": 3}, "decoding.threshold", "threshold is 3.0, but must be a number from 0 to 2"),
    ({"threshold": "0.5"}, "decoding.threshold", "decoding.threshold must be a number"),
    ({"threshold": True}, "decoding.threshold", "decoding.threshold must be a number"),
    ({"threshold": [0.5]}, "decoding.threshold", "decoding.threshold must be a number"),
    ({"radius": 4}, "decoding.radius", "decoding.radius is no parameter here; there are load, lowest, threshold"),
    ({"policy": "localleap", "radius": 1.5}, "decoding.radius", "must be a whole number from 0 to 1024"),
    ({"policy": "threshold", "planner": "adablock", "threshold": 1}, "decoding.threshold", "selector and planner"),
    ({"selector.threshold": 9}, "decoding.selector.threshold", "must be a number from 0 to 2"),
    ({"policy": "low_confidence", "steps": 0}, "decoding.steps", "must be between 1 and the 8 tokens of a block"),
    ({"policy": "low_confidence", "steps": 9}, "decoding.steps", "decoding.steps is 9"),
    ({"policy": "low_confidence", "steps": 1.5}, "decoding.steps", "decoding.steps: Input should be a valid integer"),
    ({"policy": "threshold", "steps": 4}, "decoding.steps", "the selector is threshold, which has no quota"),
    ({"block_size": 16}, "decoding.block_size", "decoding.block_size is 16, but the blocks of this model have 8"),
    ({"gen_length": 16}, "decoding.gen_length", "decoding.gen_length is for bidirectional models"),
    ({"confidence": "high"}, "decoding.confidence", "Input should be 'raw' or 'filtered'"),
    ({"eos": "now"}, "decoding.eos", "Input should be 'free', 'never' or 'last'"),
    ({"eos": 1}, "decoding.eos", "decoding.eos"),
]


@pytest.mark.parametrize(
    ("value", "param", "message"), REFUSALS, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(REFUSALS)]
)
def test_what_cannot_be_had_is_refused_by_name(dual: Server, value: Any, param: str, message: str) -> None:
    for path in PATHS:
        found = refused(dual, path, decoding=value)
        assert found[0] == param
        assert message in found[1]


@pytest.mark.parametrize("value", ["auto", 1, [], True])
def test_decoding_is_an_object(dual: Server, value: Any) -> None:
    assert refused(dual, decoding=value)[0] == "decoding"


COMPANY: list[tuple[dict[str, Any], str, str]] = [
    ({"echo": True}, "echo", "echo is true"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs is given"),
    ({"n": 1, "best_of": 2}, "best_of", "best_of"),
    ({"speculation": {"mode": "on"}}, "speculation", "speculation.mode"),
    ({"speculation": {"max_tokens": 2}}, "speculation", "speculation.max_tokens"),
    ({"speculation": {"drafter": "prediction"}}, "speculation", "speculation.drafter"),
    ({"speculation": {"verify": "block"}}, "speculation", "speculation.verify"),
    ({"speculation": {"tree": True}}, "speculation", "speculation.tree"),
]


@pytest.mark.parametrize(
    ("fields", "param", "message"), COMPANY, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(COMPANY)]
)
def test_what_no_denoising_can_give_is_refused_with_both_fields(
    dual: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    info = dual.engine.info
    try:
        dual.engine.info = replace(info, drafters=(("prediction", False),), speculation="auto")
        for how in ({"model": "tiny-diffusion"}, {"decoding": {"policy": "threshold"}}):
            found = refused(dual, **how, **fields)
            assert found[0] == param
            assert message in found[1]
            if param != "best_of":
                assert (
                    "the model tiny-diffusion denoises" if "model" in how else "decoding.policy threshold"
                ) in found[1]
        if param != "best_of":
            assert ask(dual, model="tiny", **fields).status_code == 200
    finally:
        dual.engine.info = info


GRAMMARS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"guided_regex": "a+"},
    {"structured_outputs": {"choice": ["a", "b"]}},
]


@pytest.mark.parametrize("fields", GRAMMARS, ids=[next(iter(fields)) for fields in GRAMMARS])
def test_a_constraint_is_read_from_left_to_right(dual: Server, fields: dict[str, Any]) -> None:
    field = next(iter(fields))
    assert denoised(dual, model="tiny-diffusion", **fields).selector.name == "sequential"
    assert denoised(dual, decoding={"policy": "threshold", "selector": "sequential"}, **fields)
    for value in ({"policy": "auto"}, {"selector": "threshold"}):
        param, message = refused(dual, decoding=value, **fields)
        assert param == field
        assert "needs the selector sequential" in message
        assert "decoding.policy" in message
    for more, why in (({"stopper": "prophet"}, "stopper prophet"), ({"steps": 4}, "decoding.steps")):
        param, message = refused(dual, decoding={"selector": "sequential", **more}, **fields)
        assert param == field
        assert why in message
    free = {"response_format": {"type": "text"}}
    assert denoised(dual, model="tiny-diffusion", **free).selector.name == "auto"


def test_ignoring_the_end_goes_with_any_rule_for_it(dual: Server) -> None:
    request = submitted(dual, decoding={"policy": "threshold", "eos": "never"}, ignore_eos=True)
    assert request.stop_ids == ()
    assert request.decoding is not None
    assert request.decoding.eos is EosRule.NEVER


@pytest.mark.parametrize("selector", sorted(SELECTORS.keys() - {"edit"}))
def test_steps_go_with_a_quota_and_with_nothing_else(dual: Server, selector: str) -> None:
    value = {"selector": selector, "steps": 4}
    if selector in WITH_QUOTA:
        assert denoised(dual, decoding=value).steps == 4
    else:
        assert refused(dual, decoding=value)[0] == "decoding.steps"


def test_a_canvas_is_whole_blocks_and_shapes_what_is_asked(canvas: Server) -> None:
    def lengths(**fields: Any) -> tuple[int, int | None]:
        request = submitted(canvas, **fields)
        assert request.decoding is not None
        return request.max_tokens, request.decoding.gen_length

    assert lengths(max_tokens=5) == (5, None)
    assert lengths(max_tokens=None) == (16, None)
    assert lengths(max_tokens=None, path="/v1/chat/completions") == (128, None)
    assert lengths(max_tokens=None, decoding={"gen_length": 64}) == (64, 64)
    assert lengths(max_tokens=40, decoding={"gen_length": 64}) == (40, 64)
    assert lengths(max_tokens=4, decoding={"gen_length": 6, "block_size": 3}) == (4, 6)
    # A step of 256 tokens holds prompt and canvas; the default shrinks, what is asked does not.
    assert lengths(max_tokens=None, prompt=[1] * 243) == (8, None)
    assert lengths(max_tokens=8, prompt=[1] * 248) == (8, None)
    assert len(submitted(canvas, max_tokens=9, prompt=[1] * 900, truncate_prompt_tokens=-1).prompt) == 240


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"decoding": {"gen_length": 12}}, "decoding.gen_length", "multiple of decoding.block_size, which is 8"),
        (
            {"decoding": {"gen_length": 12, "block_size": 5}},
            "decoding.gen_length",
            "multiple of decoding.block_size, which is 5",
        ),
        ({"decoding": {"gen_length": 0}}, "decoding.gen_length", f"must be between 1 and {MODEL_LEN}"),
        ({"decoding": {"block_size": 1024}}, "decoding.block_size", f"must be between 1 and {MODEL_LEN}"),
        ({"max_tokens": 17, "decoding": {"gen_length": 16}}, "max_tokens", "decoding.gen_length is 16, and no answer"),
        ({"max_tokens": 250}, "max_tokens", "258"),
        ({"max_tokens": None, "decoding": {"gen_length": 256}}, "decoding.gen_length", "which holds 256 tokens here"),
        ({"max_tokens": 512}, "max_tokens", "maximum context length is 512 tokens. However, you requested 514"),
        ({"prompt": [1] * 249, "max_tokens": 1}, "prompt", "257"),
        ({"prompt": [1] * 249, "max_tokens": None}, "prompt", "257"),
        ({"decoding": {"cache": "exact"}}, "decoding.cache", "is for block_causal models"),
        ({"decoding": {"policy": "llada2"}}, "decoding.policy", "is for block_causal models"),
        ({"decoding": {"policy": "elastic", "width": 8}}, "decoding.width", "planner and cache"),
        ({"decoding": {"cache": "dkv_greedy"}}, "decoding.cache", "goes with selector random"),
    ],
)
def test_a_canvas_that_cannot_be_had_is_refused(
    canvas: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    found = refused(canvas, **fields)
    assert found[0] == param
    assert message in found[1]


def test_line_ends_are_found_in_the_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    assert tokenizer.line_end_ids(64) == (newline,)
    assert tokenizer.line_end_ids(0) == ()


def test_the_openapi_document_lists_the_parameters() -> None:
    app, _, _ = make_app()
    schemas = app.api.openapi()["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    fields = schemas["schema"]["$defs"]["DecodingFields"]["properties"]
    assert {"policy", "steps", "threshold", "radius", "drift"} <= set(fields)
