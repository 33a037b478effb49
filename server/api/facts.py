"""What validation must know of the served model, and the names it answers to."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.types import DiffusionModel
from server.api.attention import AttentionFacts
from server.api.errors import ApiError, shown
from server.api.prompt_attention import PromptAttentionFacts
from server.api.speculation import SpeculationFacts
from server.engine.decoding import DIFFUSION_SUFFIX


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Lengths in tokens.

    names        all that a request may give as `model`, those of other models too; the first is the default
    model        the engine's name of this one (`Request.model`)
    diffusion    how the model denoises; None = it only generates token by token
    delimiters   token ids with a line's end in them, for the planner that looks for them
    max_step     tokens of a step: a bidirectional model computes prompt and canvas in one
    """

    names: tuple[str, ...]
    model: str
    model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_logprobs: int
    max_choices: int
    max_queued_tokens: int
    speculation: SpeculationFacts = field(default_factory=SpeculationFacts)
    attention: AttentionFacts = field(default_factory=AttentionFacts)
    prompt_attention: PromptAttentionFacts = field(default_factory=PromptAttentionFacts)
    diffusion: DiffusionModel | None = None
    delimiters: tuple[int, ...] = ()
    max_step: int = 1024

    def denoises(self, name: str | None) -> bool:
        """Does a request under this name denoise unless it says otherwise?"""
        if self.diffusion is None:
            return False
        return not self.diffusion.is_dual or (name is not None and name.endswith(DIFFUSION_SUFFIX))


def check_model(name: str | None, facts: ModelFacts) -> None:
    if name is not None and name not in facts.names:
        message = f"the model {shown(name)} does not exist; this server has {', '.join(facts.names)}"
        raise ApiError(404, message, "model", "model_not_found")


def served_names(names: tuple[str, ...], diffusion: DiffusionModel | None) -> tuple[str, ...]:
    """A model that can do both has each name twice: as it is, token by token; with the suffix, denoising.

    Raises ValueError where a given name of such a model already has the suffix: it would not tell what is meant.
    """
    if diffusion is None or not diffusion.is_dual:
        return names
    for name in names:
        if name.endswith(DIFFUSION_SUFFIX):
            raise ValueError(
                f"served-model-name is {name}, but names that end in {DIFFUSION_SUFFIX} are made by the server: "
                f"this model answers under {name}{DIFFUSION_SUFFIX} too"
            )
    return (*names, *(name + DIFFUSION_SUFFIX for name in names))
