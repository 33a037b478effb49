"""The text of an output does not depend on how it was cut, and is never taken back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from server.text.detokenizer import Detokenizer, StopConditions, first_match, held_suffix_len
from server.text.tokenizer import Tokenizer
from tests.server.api.fake_engine import byte_tokenizer

BYTES = byte_tokenizer()


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece-like: words with a leading mark, bytes for the rest."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab.update({"▁hi": 256, "▁": 257, "a": 258, "\ufffd": 259})
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(raw)


def pieces(tokenizer: Tokenizer, ids: list[int], stop: StopConditions | None = None) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    shown = []
    for token in ids:
        shown.append(detokenizer.push(token))
        if detokenizer.stopped is not None:
            return shown, detokenizer
    return [*shown, detokenizer.finish()], detokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_pieces_are_the_text(text: str) -> None:
    shown, detokenizer = pieces(BYTES, BYTES.encode(text, add_special_tokens=False))
    assert "".join(shown) == text
    assert detokenizer.num_chars == len(text)


@given(st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_bytes_become_text_without_stalling(value: bytes) -> None:
    alphabet = {BYTES.token_bytes(i): i for i in range(256)}
    shown, _ = pieces(BYTES, [alphabet[bytes([byte])] for byte in value])
    assert "".join(shown) == value.decode("utf-8", "replace")


def test_a_character_appears_with_its_last_byte_and_a_literal_replacement_character_at_once() -> None:
    shown, _ = pieces(BYTES, BYTES.encode("😀\ufffdx", add_special_tokens=False))
    assert shown == ["", "", "", "😀", "", "", "\ufffd", "x", ""]


def test_sentencepiece_words_keep_their_spaces_and_bytes_wait_for_their_character() -> None:
    tokenizer = fallback_tokenizer()
    emoji = list("😀".encode())
    shown, _ = pieces(tokenizer, [256, 256, *emoji, 258])
    assert "".join(shown) == "hi hi😀a"
    assert shown[2:6] == ["", "", "", "😀"]


def test_a_literal_replacement_character_does_not_stall_a_window_stream() -> None:
    shown, _ = pieces(fallback_tokenizer(), [258, 259, 258, 0xFF, 258])
    assert "".join(shown[:-1]).startswith("a\ufffda")
    assert "".join(shown) == "a\ufffda\ufffda"
    assert shown[1] == "\ufffd"


@given(
    st.text(alphabet="ab\u00e9", min_size=1, max_size=24),
    st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_cut_at_the_first_complete_match_however_the_text_is_cut(
    text: str, stops: list[str], include: bool
) -> None:
    condition = StopConditions(tuple(stops), include)
    shown, detokenizer = pieces(BYTES, BYTES.encode(text, add_special_tokens=False), condition)
    match = next((found for end in range(len(text) + 1) if (found := first_match(text[:end], stops))), None)
    expected = text if match is None else text[: match[0]] + (match[1] if include else "")
    assert "".join(shown) == expected
    assert detokenizer.stopped == (None if match is None else match[1])
    assert detokenizer.num_chars == len(expected)
    if not include:
        for i in range(len(shown)):
            assert text.startswith("".join(shown[:i])), "no character is taken back"


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    assert held_suffix_len("hello w", ["world"]) == 1
    assert held_suffix_len("hello", ["world"]) == 0
    assert held_suffix_len("aab", ["aabaac", "abx"]) == 3
    assert held_suffix_len("world", ["world"]) == 0


def test_stop_strings_wait_for_min_tokens() -> None:
    shown, detokenizer = pieces(BYTES, BYTES.encode("abXabX", False), StopConditions(("X",), min_tokens=3))
    assert "".join(shown) == "abXab"
    assert detokenizer.stopped == "X"


def test_a_hidden_stop_token_counts_but_shows_nothing_and_specials_are_skipped() -> None:
    eos = BYTES.eos_id
    assert eos is not None
    visible = Detokenizer(BYTES, skip_special_tokens=False)
    assert visible.push(eos) == "<eos>"
    assert visible.push(eos, is_hidden=True) == ""
    assert Detokenizer(BYTES).push(eos) == ""


def test_many_characters_of_fallback_bytes_in_a_row_are_all_whole() -> None:
    text = "😀漢é😀😀" * 4
    shown, _ = pieces(fallback_tokenizer(), list(text.encode()))
    assert "".join(shown) == text
