"""`python -m server.worker.gpu_checks`: proves the worker's GPU path on this machine's GPU. No HTTP, no test library.

- A captured step, replayed, equals the same step run as it is, bit for bit: hidden states and all KV pages.
- Steps whose keys come from host memory, copied beside the layers, equal the same steps over pages that stay.
- Random steps of all kinds compile nothing after warm-up, and every one of them is answered.
- Steps launched before the one before is over give the tokens of steps that wait, and no launch waits for the device.
- The memory that is really held agrees with the ledger.

Exit code 0 if all is right, 1 if a check failed, 2 without a GPU: then nothing is claimed.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch

from kernels.ops import FixedPlans, Ops
from kernels.select import select_ops
from server.models.loading import random_model
from server.models.registry import Model
from server.worker.accelerator import CudaAccelerator, CudaGraphs
from server.worker.ahead_checks import ahead_checks
from server.worker.build import build_worker
from server.worker.config import WorkerConfig
from server.worker.graphs import Capture, GraphedForward, graph_sizes
from server.worker.kv_pool import KVPool, pages_for
from server.worker.memory import ON_HOST, show
from server.worker.offload_checks import offload_check
from server.worker.random_steps import Space, random_batches, random_plans
from server.worker.transfer import Transfer
from server.worker.worker import Worker

SHAPE = "hidden=1024,layers=8,heads=16,kv_heads=4,head_dim=128,mlp=3072,vocab=32000,max_len=4096"
MODELS = (("braid-tiny", None), ("random", SHAPE), ("random, windows", f"{SHAPE},model_type=mistral,window=256"))
"""Name and shape of the models that are checked: the embedded one, which denoises too, and larger ones."""
TOLERATED = 256 << 20
"""Bytes by which the device may hold more than the ledger says: what the allocator keeps in halves of its blocks."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="random steps of each model after warm-up")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        say("No CUDA device here: nothing was checked on a GPU.")
        return 2
    failures = 0
    for name, shape in MODELS:
        say(f"{name}:")
        failures += check_model("braid-tiny", shape, arguments.steps)
    return 1 if failures else 0


def check_model(model: str, shape: str | None, num_steps: int) -> int:
    """The number of checks that failed."""
    failures, device = 0, torch.device("cuda")
    if shape is not None:
        for dtype in (torch.bfloat16, torch.float32):
            ops = select_ops(device, dtype)
            other = random_model(shape, ops, dtype, device)
            failures += told(replay_check(other, ops, dtype, device, CudaGraphs(), 60))
            if not any(other.config.windows):
                failures += told(offload_check(other, ops, dtype, device, 60))
    accelerator = CudaAccelerator()
    config = WorkerConfig(model, device="cuda", random_weights=shape, kv_cache_bytes=1 << 30, remember_profile=False)
    worker = build_worker(config, progress=True, accelerator=accelerator)
    worker.profile()
    ahead = ahead_checks(worker, 24, 60) + ahead_checks(worker, 3, 200)
    for check in (*random_checks(worker, config.max_batched_tokens, num_steps), *ahead):
        failures += told(check)
    reading, ledger = accelerator.read(), dict(worker.info.memory)
    held = reading.total - reading.free
    listed = sum(size for what, size in ledger.items() if what not in ("unused", "activations", ON_HOST))
    text = f"the device holds {show(held)} between steps, by the ledger {show(listed)}"
    return failures + told((text, held <= listed + TOLERATED))


def told(check: tuple[str, bool]) -> bool:
    """Print a check; True if it failed."""
    what, is_right = check
    say(f"  {'right' if is_right else 'WRONG'}  {what}")
    return not is_right


def replay_check(
    model: Model, ops: Ops, dtype: torch.dtype, device: torch.device, capture: Capture, num_steps: int, seed: int = 0
) -> tuple[str, bool]:
    """Random steps, replayed, and run as they are on the same inputs and pages."""
    space = Space(500, 64, model.config.max_position, model.config.vocab_size)
    pool = KVPool(ops, model.config, space.num_pages, space.page_size, dtype, device, has_spare=True)
    parts = [part for layer in pool.layers for part in layer]
    for part in parts:
        part.normal_()
    sizes, max_pages = graph_sizes(256), pages_for(space.model_len, space.page_size) + 1
    plans = ops if isinstance(ops, FixedPlans) else None
    graphs = GraphedForward(model, plans, pool, max_pages, sizes, capture, Transfer(device))
    graphs.capture()
    num_different = 0
    for host in random_batches(random.Random(seed), space, num_steps, sizes[-1]):
        with torch.inference_mode():
            before = [part.clone() for part in parts]
            batch = graphs.place(host)
            replayed = graphs.forward(batch.tokens, batch.rows, pool.layers).clone()
            after = [part.clone() for part in parts]
            for part, was in zip(parts, before, strict=True):
                part.copy_(was)
            as_it_is = model.forward(batch.tokens, batch.rows, pool.layers)[: len(replayed)]
            pairs = [(replayed, as_it_is), *((part[:-1], was[:-1]) for part, was in zip(parts, after, strict=True))]
            num_different += not all(torch.equal(bits(one), bits(other)) for one, other in pairs)
    return (
        f"{dtype}: {num_steps} replayed steps, {num_different} differ from the same steps as they are",
        not num_different,
    )


def random_checks(worker: Worker, most_rows: int, num_steps: int, seed: int = 1) -> list[tuple[str, bool]]:
    """Random steps up to the token budget, captured or not."""
    num_compiled = num_errors = 0
    for plan in random_plans(random.Random(seed), worker.info, num_steps, most_rows):
        result = worker.run(plan)
        num_compiled += result.num_compiled
        num_errors += sum(outcome.error is not None for outcome in result.outcomes)
    return [
        (f"{num_compiled} kernels compiled in {num_steps} random steps", num_compiled == 0),
        (f"{num_errors} spans of these steps without an answer", num_errors == 0),
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
