"""The fake worker's block-causal model: a block's KV is a hash of all its tokens, what is fixed a hash of that KV.

So a token depends on everything that the real one depends on (the blocks before, the block as it stands, the step, the
seed, the window, the quota, the threshold), and each mistake with any of them changes the text. Two-sided policies edit
and mask again, the planner that looks at predictions ends windows, the stopper ends texts: as hashes say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.hashing import EMPTY, mix
from scheduler.types import Denoise, Denoised, DiffusionModel, Outcome, Read, Request, Span, TokenLogprob

_BLOCK = 0xB10C
_FIX, _TOKEN, _EDIT, _AGAIN, _END, _WINDOW, _GUESS = range(1, 8)

ReadKV = Callable[[int], int]
WriteKV = Callable[[int, int], None]


def write_rows(read: ReadKV, write: WriteKV, size: int, start: int, tokens: Sequence[int]) -> None:
    """KV of rows from `start` on: whole blocks, or some rows of one whose others are cached. Blocks of one token are
    causal: their KV is what fake_worker.py writes."""
    for lo in range(start // size * size, start + len(tokens), size):
        state = read(lo - 1) if lo else EMPTY
        if size == 1:
            write(lo, mix(state, tokens[lo - start]))
            continue
        state = mix(state, _BLOCK)
        for position in range(lo, lo + size):
            is_own = start <= position < start + len(tokens)
            state = mix(state, tokens[position - start] if is_own else read(position))
        for position in range(max(lo, start), min(lo + size, start + len(tokens))):
            write(position, mix(state, position))


def read_block(
    request: Request, model: DiffusionModel, kv: int, denoise: Denoise, tokens: Sequence[int], vocab_size: int
) -> tuple[tuple[int, ...], Denoised]:
    """What a step changes in a block of `tokens`, given the hash of all that its rows see."""
    how = request.decoding
    assert how is not None, "a block of an autoregressive request"
    lo, mask_id = denoise.lo, model.mask_id
    state = mix(mix(mix(kv, request.sampling.seed), request.sampling.sample_index), denoise.step)
    for number in (denoise.quota, int(1e6 * denoise.progress), *denoise.window, int(1e6 * (denoise.threshold or 0.0))):
        state = mix(state, number)

    def dice(purpose: int, position: int) -> int:
        return mix(mix(state, purpose), position)

    first, end = denoise.window
    window_end = None
    masks = [position for position in range(first, end) if tokens[position - lo] == mask_id]
    if how.planner.name == "adablock" and len(masks) == end - first and dice(_WINDOW, 0) % 2:
        window_end = end = first + 1 + dice(_WINDOW, 1) % (end - first)
    masks = [position for position in masks if position < end]
    ranked = sorted(masks, key=lambda position: dice(_FIX, position))
    fixed = (
        ranked if denoise.is_last else [p for n, p in enumerate(ranked) if n < denoise.quota or dice(_FIX, p) % 4 == 0]
    )
    changes = {position: dice(_TOKEN, position) % vocab_size for position in fixed}
    mine = [p for p in range(max(lo, len(request.prompt)), denoise.hi) if tokens[p - lo] != mask_id]
    if how.selector.name == "edit":
        changes |= {p: dice(_TOKEN, p) % vocab_size for p in mine if dice(_EDIT, p) % 8 == 0}
    if how.selector.name == "wino" and not denoise.is_last:
        again = [p for p in mine if dice(_AGAIN, p) % 3 == 0][: max(0, len(fixed) - 1)]
        changes |= dict.fromkeys(again, mask_id)
    left = [p for p in range(lo, denoise.hi) if tokens[p - lo] == mask_id and p not in changes]
    guesses: tuple[tuple[int, int, float], ...] = ()
    if how.selector.name == "auto":
        guesses = tuple((p, dice(_GUESS, p) % 2, (dice(_GUESS, p) % 101) / 100.0) for p in left)
    text_end = None
    if how.stopper.name == "eotp" and dice(_END, 0) % 8 == 0:
        begin = max(lo, len(request.prompt))
        text_end = begin + dice(_END, 1) % (denoise.hi - begin + 1)
    positions = tuple(sorted(changes))
    return tuple(changes[p] for p in positions), Denoised(positions, text_end, window_end, guesses=guesses)


def denoise_logprob(kv: int, token: int) -> TokenLogprob:
    """A number that only the right block gives."""
    return TokenLogprob(token=token, logprob=-(mix(kv, token) % 1000) / 100.0, rank=1)


def run_block_span(
    request: Request, model: DiffusionModel, read: ReadKV, write: WriteKV, span: Span, vocab_size: int
) -> Outcome:
    """The outcome of a span of a block-causal request. Raises AssertionError for one that breaks the contract."""
    size, denoise, start = model.block_size, span.denoise, span.start
    assert span.mask_block == size, "the span has another mask"
    shadow = denoise.shadow if denoise else 0
    own = span.tokens[: len(span.tokens) - shadow]
    end = span.kv_len - shadow
    assert end % size == 0, "a span ends within a block"
    assert start % size == 0 or (denoise and denoise.state and start + len(own) <= denoise.hi), "it starts within one"
    prompt = request.prompt[start : start + len(own)]
    assert own[: len(prompt)] == prompt, "the prompt's tokens are not the prompt's"
    write_rows(read, write, size, start, own)
    for index in range(end, span.kv_len):
        write(index, mix(EMPTY, index))
    if denoise is None:
        assert span.read is Read.NOTHING, "clean rows are read"
        assert not span.judged, "clean rows are judged"
        assert model.mask_id not in own, "final KV of a mask"
        return Outcome(span.seq_id)
    assert span.read is Read.DENOISE, "a denoise span is read in another way"
    assert (denoise.lo % size, denoise.hi - denoise.lo) == (0, size), "that is no block"
    assert model.mask_id not in own[: max(0, denoise.lo - start)], "final KV of a mask"
    tokens = denoise.state or own[denoise.lo - start :]
    is_carried = end == denoise.lo
    assert len(tokens) == size, "the block's tokens are not all there"
    targets = {start + offset + model.shift for offset in span.judged if offset < len(own)}
    first, stop = denoise.window
    assert denoise.lo <= first < stop <= denoise.hi, "a window outside its block"
    wanted = {position for position in range(first, stop) if tokens[position - denoise.lo] == model.mask_id}
    assert wanted <= targets, "a mask of the window has no judged row"
    assert targets <= set(range(denoise.lo, denoise.hi)), "a row is judged for another block"
    assert not is_carried or (model.shift and targets == {denoise.lo}), "the row before a block gives one token"
    kv = read(end - 1)
    for position in () if is_carried else range(denoise.lo, denoise.hi):
        kv = mix(kv, read(position))
    answer, denoised = read_block(request, model, kv, denoise, tokens, vocab_size)
    wants = request.sampling.logprobs is not None
    logprobs = tuple(denoise_logprob(kv, token) for token in answer) if wants else ()
    return Outcome(span.seq_id, answer, logprobs, denoised=denoised)
