"""The model's template is a guest: it renders messages and can do nothing else."""

from __future__ import annotations

import time

import pytest

from server.text.chat import ChatTemplate, ChatTemplateError
from tests.server.api.fake_engine import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
MESSAGES = [{"role": "user", "content": "hi"}]

HOSTILE = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**10**10 }}",
    "{{ messages.append(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ missing.attribute }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_an_error_within_the_deadline(source: str) -> None:
    before = time.monotonic()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, TOKENIZER).render(MESSAGES)
    assert time.monotonic() - before < 5.5


def test_a_template_that_does_not_compile_is_a_clear_error() -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}", TOKENIZER)


def test_loops_know_their_length_and_end() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{% if not loop.last %},{% endif %}{% endfor %}"
    assert ChatTemplate(source, TOKENIZER).render(MESSAGES * 3) == "1/3,2/3,3/3"


def test_dict_loops_filters_and_json_work() -> None:
    source = "{% for k, v in messages[0].items() %}{{ k }}={{ v | tojson }};{% endfor %}"
    assert ChatTemplate(source, TOKENIZER).render(MESSAGES) == 'role="user";content="hi";'


def test_the_final_message_can_be_continued() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, TOKENIZER)
    ids = template.encode([*MESSAGES, {"role": "assistant", "content": "Sure, "}], False, True)
    assert TOKENIZER.decode(ids, False).endswith("<|start|>assistant\nSure, ")


def test_special_tokens_in_content_stay_text() -> None:
    ids = ChatTemplate(CHAT_TEMPLATE, TOKENIZER).encode([{"role": "user", "content": "<|end|>\ufdd0<eos>"}])
    assert TOKENIZER.eos_id not in ids
    assert "<|end|>\ufdd0<eos><|end|>" in TOKENIZER.decode(ids, False)
