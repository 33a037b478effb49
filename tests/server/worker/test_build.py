"""`build_worker` on a real checkpoint folder: generation equals transformers, and what the machine decides."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kernels.reference import gumbel_noise
from scheduler.types import Grammar, GrammarKind, Request, Sampling
from server.worker import machine
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.machine import choose_device, choose_dtype, usable_cores
from server.worker.worker import Worker
from tests.server.worker.tiny_model import Driver
from tests.tiny import EOS, VOCAB_SIZE, write_tiny_checkpoint

PAGES = 3 << 20
"""Bytes of KV: enough for these tests, whatever the machine has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Worker:
    return make(folder)


def make(folder: Path, **options: object) -> Worker:
    settings: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "kv_cache_bytes": PAGES,
        "num_threads": 1,
        "remember_profile": False,
    }
    return build_worker(WorkerConfig(model=str(folder), **(settings | options)), progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def expected(oracle: torch.nn.Module, request: Request) -> list[int]:
    tokens = list(request.prompt)
    sampling = request.sampling
    with torch.inference_mode():
        while len(tokens) - len(request.prompt) < request.max_tokens:
            logits = oracle(torch.tensor([tokens])).logits[0, -1].float()
            if sampling.temperature > 0:
                place = torch.tensor([len(tokens) - len(request.prompt)])
                noise = gumbel_noise(len(logits), torch.tensor([sampling.seed]), torch.tensor([0]), place)
                logits = logits / sampling.temperature + noise[0]
            tokens.append(int(logits.argmax()))
    return tokens[len(request.prompt) :]


def requests() -> list[Request]:
    prompts = [tuple(3 + (i * 37 + j * 11) % (VOCAB_SIZE - 3) for j in range(5 + 13 * i)) for i in range(5)]
    warmth = [0.0, 1.0, 0.7, 0.0, 1.4]
    return [
        Request(str(i), prompt, 16, Sampling(temperature=t, seed=i << 40))
        for i, (prompt, t) in enumerate(zip(prompts, warmth, strict=True))
    ]


@pytest.mark.parametrize("chunk", [16, 1000])
def test_a_llama_generates_what_transformers_does_alone_chunked_and_batched(
    worker: Worker, oracle: torch.nn.Module, chunk: int
) -> None:
    wanted = [expected(oracle, request) for request in requests()]
    assert Driver(worker, chunk).generate(requests()) == wanted
    assert [Driver(worker, chunk).generate([request])[0] for request in requests()] == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_alone_gives_the_tokens_it_gives_in_a_crowd_of_32(folder: Path, dtype: str) -> None:
    asked = [
        Request(f"c{i}", tuple(3 + (i * 7 + j * 5) % 300 for j in range(1 + 5 * i)), 12, Sampling(seed=i, top_p=0.95))
        for i in range(32)
    ]
    together = Driver(make(folder, dtype=dtype, kv_cache_bytes=4 * PAGES), chunk=16).generate(asked)
    alone = make(folder, dtype=dtype, num_threads=2)
    for place in (0, 9, 31):
        assert Driver(alone).generate([asked[place]])[0] == together[place]


def test_a_schema_is_obeyed_with_the_checkpoints_own_tokenizer(worker: Worker) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(worker_tokenizer(worker)))
    grammar = Grammar(GrammarKind.CHOICE, '["sort", "dog \\u00e9"]')
    asked = [Request(f"g{i}", (5, 6), 30, Sampling(seed=i, grammar=grammar), (EOS,)) for i in range(6)]
    for request in asked:
        worker.prepare(request)
    texts = {tokenizer.decode(output[:-1]) for output in Driver(worker).generate(asked)}
    assert texts <= {"sort", "dog é"}
    assert texts


def worker_tokenizer(worker: Worker) -> Path:
    path = worker._grammars._tokenizer_file
    assert path is not None
    return path


def test_the_facts_of_a_worker_are_those_of_its_model(worker: Worker, oracle: torch.nn.Module) -> None:
    info = worker.info
    assert info.num_parameters == sum(parameter.numel() for parameter in oracle.parameters())
    assert (info.vocab_size, info.eos_ids, info.dtype, info.device) == (VOCAB_SIZE, (EOS,), "float32", "cpu")
    assert info.num_pages * info.page_size * 2 * 2 * 2 * 16 * 4 == info.kv_bytes <= PAGES
    assert info.model_len == 512


def test_a_profile_of_a_real_model_stays_within_its_time(folder: Path) -> None:
    fresh = make(folder)
    samples = fresh.profile()
    assert len(samples) >= 3
    assert samples[0].features.tokens == 1
    assert sum(sample.seconds for sample in samples) < 1.5
    assert Driver(fresh).generate(requests()[:1]) == Driver(make(folder)).generate(requests()[:1])


def test_a_length_beyond_the_model_or_the_pool_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len is 4096, but the model's positions end at 512"):
        make(folder, max_model_len=4096)
    with pytest.raises(ValueError, match="one request of 512 tokens needs 16 pages"):
        make(folder, max_model_len=512, kv_cache_bytes=1 << 17)
    assert make(folder, kv_cache_bytes=1 << 17).info.model_len == 256


def test_random_weights_of_a_shape_serve_without_a_checkpoint(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    shape = "hidden=32,layers=1,heads=2,kv_heads=1,mlp=64,vocab=300"
    with caplog.at_level(logging.INFO, "server.worker.build"):
        worker = make(tmp_path / "nowhere", random_weights=shape)
    assert worker.info.vocab_size == 300
    assert "random weights without a tokenizer" in caplog.text
    request = Request("a", (5, 6, 7), 8, Sampling(temperature=0.0))
    assert len(Driver(worker).generate([request])[0]) == 8
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        worker.prepare(Request("b", (5,), 8, Sampling(grammar=Grammar(GrammarKind.REGEX, "a"))))


def test_names_of_devices_and_dtypes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="dtype is 'fp8'; expected auto, bfloat16"):
        choose_dtype("fp8", cpu)
    with pytest.raises(ValueError, match="device is 'tpu'; expected auto, cpu or cuda"):
        choose_device("tpu")
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx2"})
    assert choose_dtype("auto", cpu) is torch.float32
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert choose_dtype("auto", cpu) is torch.bfloat16
    assert choose_dtype("float16", cpu) is torch.float16


def test_threads_follow_the_cores_and_the_quota_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    monkeypatch.setattr(machine, "_core_of", lambda cpu: ("0", str(cpu // 2)))
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 1 << 16)
    assert usable_cores() == 3
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 2)
    assert usable_cores() == 2
