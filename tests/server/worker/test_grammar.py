"""Structured output: what a grammar lets through parses, what cannot be enforced is refused with a sentence."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from scheduler.types import Grammar, GrammarKind, Request, Sampling
from server.worker.grammar import GrammarCompiler, GrammarMask, GrammarMatcher, compile_grammar, depth
from tests.server.worker.tiny_model import EOS, Driver, TinyModel, make_worker

VOCAB = 320

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 4},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)
CASES = {
    GrammarKind.JSON_SCHEMA: SCHEMA,
    GrammarKind.REGEX: r"(ab|cd){2,5}-[0-9]{3}",
    GrammarKind.LARK: 'start: greeting " " /[a-z]{2,6}/ "!"\ngreeting: "hello" | "bye"',
    GrammarKind.CHOICE: '["yes", "no", "may\\"be", "naïve"]',
}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB, sharpness=1.0)


def asked(kind: GrammarKind, source: str, seed: int = 0, **sampling: object) -> Request:
    rules = Sampling(temperature=1.0, seed=seed, grammar=Grammar(kind, source), **sampling)  # type: ignore[arg-type]
    return Request(f"{kind}-{seed}", (5, 6, 7), 120, rules, stop_ids=(EOS,))


def text(tokenizer_file: Path, tokens: list[int]) -> str:
    return str(Tokenizer.from_file(str(tokenizer_file)).decode(tokens))


def check(kind: GrammarKind, output: str) -> None:
    if kind is GrammarKind.JSON_SCHEMA:
        value = json.loads(output)
        assert set(value) == {"name", "age", "tags"}
        assert 0 <= value["age"] <= 99
        assert len(value["tags"]) <= 2
        assert set(value["tags"]) <= {"a", "b"}
    elif kind is GrammarKind.REGEX:
        assert re.fullmatch(CASES[kind], output)
    elif kind is GrammarKind.LARK:
        assert re.fullmatch(r"(hello|bye) [a-z]{2,6}!", output)
    else:
        assert output in json.loads(CASES[kind])


def test_every_output_obeys_its_grammar_and_ends_by_itself_in_a_mixed_batch(
    model: TinyModel, tokenizer_file: Path
) -> None:
    requests = [asked(kind, source, seed) for seed in range(5) for kind, source in CASES.items()]
    worker = make_worker(model, num_pages=2000, tokenizer_file=tokenizer_file)
    for request in requests:
        worker.prepare(request)
    plain = Request("plain", (9, 8), 20, Sampling(temperature=0.0))
    outputs = Driver(worker).generate([*requests, plain])
    finished = 0
    for request, output in zip(requests, outputs, strict=False):
        assert request.sampling.grammar is not None
        if output[-1] == EOS:
            check(request.sampling.grammar.kind, text(tokenizer_file, output[:-1]))
            finished += 1
    # A random model may use up max_tokens on white space between JSON tokens.
    assert finished >= 16
    assert outputs[-1] == Driver(make_worker(model)).generate([plain])[0]


def test_a_json_object_is_what_response_format_json_object_gives(model: TinyModel, tokenizer_file: Path) -> None:
    bias = tuple((token, 6.0) for token in Tokenizer.from_file(str(tokenizer_file)).encode('{}"').ids)
    requests = [asked(GrammarKind.JSON_OBJECT, "", seed, logit_bias=bias) for seed in range(6)]
    outputs = Driver(make_worker(model, num_pages=2000, tokenizer_file=tokenizer_file)).generate(requests)
    ended = [text(tokenizer_file, output[:-1]) for output in outputs if output[-1] == EOS]
    assert len(ended) >= 3
    assert all(isinstance(json.loads(output), dict) for output in ended)


def test_white_space_in_json_is_free_but_bounded(model: TinyModel, tokenizer_file: Path) -> None:
    space = Tokenizer.from_file(str(tokenizer_file)).encode(" ").ids[0]
    request = asked(GrammarKind.JSON_OBJECT, "", logit_bias=((space, 100.0),))
    output = text(tokenizer_file, Driver(make_worker(model, tokenizer_file=tokenizer_file)).generate([request])[0])
    assert " " * 32 in output
    assert " " * 33 not in output


def test_a_resumed_constrained_output_goes_on_where_it_stopped(model: TinyModel, tokenizer_file: Path) -> None:
    request = asked(GrammarKind.REGEX, CASES[GrammarKind.REGEX], 3)
    whole = Driver(make_worker(model, tokenizer_file=tokenizer_file)).generate([request])[0]
    for cut in (1, 4, len(whole) - 1):
        resumed = replace(request, output=tuple(whole[:cut]))
        assert Driver(make_worker(model, tokenizer_file=tokenizer_file)).generate([resumed])[0] == whole


def test_a_resumed_output_that_its_grammar_forbids_fails_with_a_reason(model: TinyModel, tokenizer_file: Path) -> None:
    request = replace(asked(GrammarKind.CHOICE, '["yes", "no"]'), output=(40,))
    driver = Driver(make_worker(model, tokenizer_file=tokenizer_file))
    assert driver.generate([request])[0] == [40]
    assert "left its grammar" in str(driver.outcomes[request.id][-1].error)


def test_the_requests_own_stop_ids_may_end_a_complete_output(model: TinyModel, tokenizer_file: Path) -> None:
    request = replace(asked(GrammarKind.CHOICE, '["no"]', logit_bias=((11, 50.0),)), stop_ids=(11,))
    output = Driver(make_worker(model, tokenizer_file=tokenizer_file)).generate([request])[0]
    assert output[-1] == 11
    assert text(tokenizer_file, output[:-1]) == "no"


def test_grammars_are_refused_with_the_reason(tokenizer_file: Path) -> None:
    deep: object = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    refused = [
        (GrammarKind.REGEX, "(", "regex grammar cannot be used: .*unclosed group"),
        (GrammarKind.REGEX, "a" * 9000, "regex grammar is 9000 bytes long; at most 8192"),
        (GrammarKind.REGEX, "(?=a)b", "look-around"),
        (GrammarKind.LARK, "start: missing", "lark grammar cannot be used: .*missing"),
        (GrammarKind.JSON_SCHEMA, "{", "json_schema grammar is not valid JSON"),
        (GrammarKind.JSON_SCHEMA, "[1]", "json_schema grammar is not a JSON object"),
        (GrammarKind.JSON_SCHEMA, '{"type": "strin"}', "json_schema grammar cannot be used: .*strin"),
        (GrammarKind.JSON_SCHEMA, json.dumps(deep), "nested deeper than 32 levels"),
        (GrammarKind.JSON_SCHEMA, "[" * 60000, "json_schema grammar is not valid JSON"),
        (GrammarKind.CHOICE, "[]", "at least one non-empty string"),
        (GrammarKind.CHOICE, '["a", 1]', "at least one non-empty string"),
    ]
    compiler = GrammarCompiler(tokenizer_file, VOCAB, (EOS,))
    for kind, source, reason in refused:
        with pytest.raises(ValueError, match=f"(?s){reason}"):
            compiler.prepare(asked(kind, source))


@pytest.mark.parametrize("source", ["(a+)+$", "(a|a)*b", "(x{0,60}){0,60}", "([a-z]+[0-9]*)*!"])
def test_regexes_that_ruin_backtracking_engines_compile_or_are_refused_quickly(
    source: str, tokenizer_file: Path
) -> None:
    compiler = GrammarCompiler(tokenizer_file, VOCAB, (EOS,))
    done = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(ValueError):
            compiler.prepare(asked(GrammarKind.REGEX, source))
        done.set()

    threading.Thread(target=attempt, daemon=True).start()
    assert done.wait(5.0)


def test_a_grammar_is_compiled_once_for_many_requests_and_forgotten_by_request(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Grammar] = []

    def count(grammar: Grammar, tokenizer: LLTokenizer) -> object:
        compiled.append(grammar)
        return compile_grammar(grammar, tokenizer)

    monkeypatch.setattr("server.worker.grammar.compile_grammar", count)
    compiler = GrammarCompiler(tokenizer_file, VOCAB, (EOS,))
    for seed in range(5):
        compiler.prepare(asked(GrammarKind.CHOICE, '["a"]', seed))
    assert len(compiled) == 1
    for seed in range(5):
        compiler.forget(f"choice-{seed}")
        compiler.forget(f"choice-{seed}")
    assert compiler.num_prepared == 0


def test_without_the_library_a_grammar_is_refused_with_its_name(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.numpy", None)
    compiler = GrammarCompiler(tokenizer_file, VOCAB, (EOS,))
    with pytest.raises(ValueError, match="needs llguidance, which is not installed"):
        compiler.prepare(asked(GrammarKind.REGEX, "a"))


def test_models_without_a_tokenizer_file_or_an_end_refuse_grammars_with_the_reason(tokenizer_file: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the model's tokenizer\.json"):
        GrammarCompiler(None, VOCAB, (EOS,)).prepare(asked(GrammarKind.REGEX, "a"))
    with pytest.raises(ValueError, match="needs an end-of-sequence token"):
        GrammarCompiler(tokenizer_file, VOCAB, ()).prepare(asked(GrammarKind.REGEX, "a"))
    with pytest.raises(ValueError, match=r"cannot use this model's tokenizer\.json"):
        GrammarCompiler(tokenizer_file, 10, (EOS,)).prepare(asked(GrammarKind.REGEX, "a"))


def test_depth_counts_levels_without_recursion() -> None:
    assert depth(1) == 1
    assert depth({"a": [1, {"b": 2}]}) == 4


def matcher_of(tokenizer_file: Path, kind: GrammarKind, source: str) -> GrammarMatcher:
    compiler = GrammarCompiler(tokenizer_file, VOCAB, (EOS,))
    found = compiler.matcher(asked(kind, source))
    assert found is not None
    return found


def allowed(mask: GrammarMask) -> set[int]:
    bits = mask.bits.view(np.uint32)
    return {token for token in range(VOCAB) if bits[token // 32] >> (token % 32) & 1}


def ids(tokenizer_file: Path, words: str) -> list[int]:
    """One token per character."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    vocab = tokenizer.get_vocab()
    return [vocab[character] for character in words]


def test_masks_along_a_tree_of_drafts_are_those_of_following_each_path(tokenizer_file: Path) -> None:
    matcher = matcher_of(tokenizer_file, GrammarKind.REGEX, CASES[GrammarKind.REGEX])
    prompt = [5, 6, 7]
    words = ["", "a", "ab", "abc", "abcd", "abcd-", "abcd-1", "c", "cd", "ad", "ada", "", "abcdab"]
    paths = [tuple(ids(tokenizer_file, word)) for word in words]
    history = [*prompt, *ids(tokenizer_file, "ab")]
    for known in (prompt, history):
        assert matcher.catch_up(known) is None
        for path, mask in zip(paths, matcher.masks(paths), strict=True):
            alone = matcher_of(tokenizer_file, GrammarKind.REGEX, CASES[GrammarKind.REGEX])
            error = alone.catch_up([*known, *path])
            assert (mask.error is None) == (error is None), (known, path)
            if error is None:
                assert allowed(mask) == allowed(alone.masks([()])[0])
            assert matcher.num_legal(known, path) == len(path) or error is not None
    behind = matcher_of(tokenizer_file, GrammarKind.REGEX, CASES[GrammarKind.REGEX])
    for path in paths:
        near, far = matcher.mask_after(history, path), behind.mask_after(history, path)
        assert (near.error, allowed(near)) == (far.error, allowed(far))


def test_drafts_beyond_an_end_or_the_vocabulary_are_illegal_and_leave_the_matcher_as_it_was(
    tokenizer_file: Path,
) -> None:
    matcher = matcher_of(tokenizer_file, GrammarKind.REGEX, "ab?")
    prompt, (a, b) = [5, 6, 7], ids(tokenizer_file, "ab")
    before = allowed(matcher.masks([()])[0])
    masks = matcher.masks([(), (a,), (a, EOS), (a, EOS, a), (VOCAB + 7,), (-1,), (1 << 40,), (a, b), (a, b, a)])
    assert [mask.error is None for mask in masks] == [True, True, False, False, False, False, False, True, False]
    assert masks[7].is_complete
    assert allowed(masks[1]) == {b, EOS}
    for drafts, count in (((a, VOCAB + 7), 1), ((-1,), 0), ((a, b, EOS), 3), ((a, a), 1), ((), 0)):
        assert matcher.num_legal(prompt, drafts) == count
    assert allowed(matcher.masks([()])[0]) == before == {a}


def test_a_matcher_that_a_draft_broke_begins_anew_with_the_history(tokenizer_file: Path) -> None:
    matcher = matcher_of(tokenizer_file, GrammarKind.REGEX, CASES[GrammarKind.REGEX])
    history = [5, 6, 7, *ids(tokenizer_file, "abcd")]
    assert matcher.catch_up(history) is None
    before = allowed(matcher.masks([()])[0])
    # An id that the tokenizer does not have is an error that llguidance does not survive.
    assert matcher._matcher.validate_tokens([1 << 19]) == 0
    assert all(mask.error is not None for mask in matcher.masks([(), tuple(ids(tokenizer_file, "ab"))]))
    assert matcher.catch_up(history) is None
    assert allowed(matcher.masks([()])[0]) == before


def test_what_a_grammar_leaves_no_choice_about_is_known_beyond_the_history(tokenizer_file: Path) -> None:
    matcher = matcher_of(tokenizer_file, GrammarKind.CHOICE, '["maybe not", "maybe so"]')
    prompt = [5, 6, 7]
    forced = matcher.forced(prompt)
    assert "maybe ".startswith(text(tokenizer_file, forced))
    assert forced
    assert matcher.forced([*prompt, *ids(tokenizer_file, "x")]) == []
    ahead = [*prompt, *ids(tokenizer_file, "maybe")]
    assert matcher.num_legal(ahead, ids(tokenizer_file, "x")) == 0
    assert matcher.forced(prompt) == forced
