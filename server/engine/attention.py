"""What an engine is told of sparse attention: part of `EngineConfig`, whose module hands it on. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduler.types import AttentionMethod, PromptAttention, PromptMethod

LabelDtype = Literal["model", "int4"]
DENSE = "dense"
"""The attention method of whoever wants every key read."""


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Sparse attention of an engine.

    methods      those that requests may choose, for their output or their prompt; the KV memory keeps what they need
    default      of requests that say nothing: dense, or one of `methods`
    budget       keys that a row reads where a request does not say
    correct_every   output tokens between two corrections where a request does not say; 0 = none
    prefill      of the prompts of requests that say nothing: dense, or one of `methods`
    prefill_threshold, prefill_from   `PromptAttention.threshold` where a request does not say, and its `dense`
    calibration, num_channels, label_dtype, offload, offload_bytes   as `server/worker/sparse_config.py` has them
    """

    methods: tuple[str, ...] = ()
    default: str = DENSE
    budget: int = 1024
    correct_every: int = 0
    prefill: str = DENSE
    prefill_threshold: float = 0.9
    prefill_from: int = 4096
    calibration: tuple[str, ...] = ()
    num_channels: int | None = None
    label_dtype: LabelDtype = "model"
    offload: bool = False
    offload_bytes: int | None = None

    def allowed(self) -> tuple[AttentionMethod, ...]:
        """The methods for output, and the default one wherever it is not among them."""
        names = dict.fromkeys((*self.methods, self.default))
        return tuple(AttentionMethod(name) for name in names if name in tuple(AttentionMethod))

    def for_prompts(self) -> tuple[PromptAttention, ...]:
        """The methods for prompts in the same way, with what a request gets that names no threshold."""
        names = dict.fromkeys((*self.methods, self.prefill))
        known = (PromptMethod(name) for name in names if name in tuple(PromptMethod))
        return tuple(PromptAttention(name, self.prefill_threshold, self.prefill_from) for name in known)

    def default_for_prompts(self) -> PromptAttention | None:
        return next((offer for offer in self.for_prompts() if offer.method == self.prefill), None)

    def check(self) -> None:
        """Raises ValueError, in the flags' names, for methods that there are not or that lack what they need."""
        known = (*AttentionMethod, *PromptMethod)
        for name in self.methods:
            if name not in known:
                raise ValueError(f"sparse-attention names {name!r}; there are {', '.join(known)}")
        for offer in self.for_prompts():
            if (misfit := offer.misfit((offer.method,))) is not None:
                flag = "attention-prefill-threshold" if misfit[0] == "prefill_threshold" else "attention-prefill-from"
                raise ValueError(f"{flag}: {offer.method} {misfit[1]}")
        with_labels = [method for method in self.allowed() if method.has_labels]
        if with_labels and not any(name.endswith(".safetensors") for name in self.calibration):
            raise ValueError(
                f"{with_labels[0]} needs the model's label channels: set attention-calibration to their file"
            )
        if self.label_dtype != "model" and not with_labels:
            raise ValueError(
                f"attention-label-dtype is {self.label_dtype}, but only double_sparsity and double_sparsity_pages have "
                "labels: name one of them with sparse-attention"
            )
        self._check_offload()
        if self.calibration and not self.allowed():
            raise ValueError("attention-calibration is set, but no method is: name some with sparse-attention")

    def _check_offload(self) -> None:
        if self.offload and self.allowed() != (AttentionMethod.DOUBLE_SPARSITY,):
            raise ValueError("kv-offload fetches keys for double_sparsity: name it alone with sparse-attention")
        if self.offload and self.for_prompts():
            raise ValueError(
                "kv-offload fetches keys for double_sparsity; block-sparse prompts choose among keys that are here: "
                "leave one of them out"
            )
        if self.offload_bytes is not None and not self.offload:
            raise ValueError("kv-offload-memory is set, but kv-offload is not")

    def without_files(self) -> AttentionConfig:
        """For another model: what was calibrated is the first one's."""
        labelled = [method for method in AttentionMethod if method.has_labels]
        methods = tuple(name for name in self.methods if name not in labelled)
        default = DENSE if self.default in labelled else self.default
        prompts = (self.prefill, self.prefill_threshold, self.prefill_from)
        return AttentionConfig(methods, default, self.budget, self.correct_every, *prompts)
