"""The same recipe in PyTorch, as fast as we know how to make it: the peer of our train step.

    python -m benchmarks.peer_torch --size b --batch 64 --steps 20 [--folded] [--compile on|off] [--dtype bfloat16]

bf16 autocast on a GPU, scaled_dot_product_attention, fused AdamW, TF32, torch.compile, foreach clip and
EMA, and no device synchronization in the step. The peer is handed ready-made, normalized views (our own
step also cuts them from raw tiles). The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.peer_model import Network, PeerSpec, dino_loss

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
Views = Sequence[tuple[Mapping[str, Tensor], Tensor]]


def groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """DINO's parameter groups: no decay for biases and vectors; the last layer apart, so that it can be frozen."""
    decayed, plain, last = [], [], []
    for name, p in network.named_parameters():
        (last if "last_layer" in name else plain if p.ndim == 1 else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": last, "weight_decay": decay},
    ]


class Trainer:
    """Student, teacher, centers, optimizer, and one step of pretraining."""

    def __init__(
        self, spec: PeerSpec, device: torch.device, dtype: torch.dtype, compiled: bool, lr: float = 1e-4,
        decay: float = 0.04, clip: float = 3.0, alpha: float = 0.8, student_temp: float = 0.1,
        teacher_temp: float = 0.04, momentum: float = 0.996, center_momentum: float = 0.9,
    ):  # fmt: skip
        self.spec, self.device, self.dtype = spec, device, dtype
        self.clip, self.alpha, self.center_momentum, self.momentum = clip, alpha, center_momentum, momentum
        self.temps = (student_temp, teacher_temp)
        self.student = Network(spec).to(device).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.overall = torch.zeros(spec.prototypes, device=device)
        self.frequent = torch.zeros(spec.prototypes, device=device)
        self.optimizer = torch.optim.AdamW(groups(self.student, decay), lr=lr, fused=True)
        self.forward = torch.compile(self._forward) if compiled else self._forward
        self.update_averages = torch.compile(self._update_averages) if compiled else self._update_averages

    def _forward(self, views: Views, teacher_views: Views, samples: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with torch.no_grad():
                teacher = self.teacher(teacher_views, samples).float()
            student = self.student(views, samples)
        center = self.alpha * self.overall + (1 - self.alpha) * self.frequent
        return dino_loss(student, teacher, center, *self.temps), teacher

    def _update_averages(self, teacher: Tensor, is_frequent: Tensor) -> None:
        m = self.center_momentum
        views, count = teacher.shape[1], is_frequent.sum()
        self.overall.mul_(m).add_(teacher.mean((0, 1)), alpha=1 - m)
        mean = (teacher * is_frequent[:, None, None]).sum((0, 1)) / (views * count).clamp_min(1)
        self.frequent.copy_(torch.where(count > 0, m * self.frequent + (1 - m) * mean, self.frequent))

    def step(self, views: Views, teacher_views: Views, is_frequent: Tensor, freeze_last: bool = False) -> Tensor:
        """One update; returns the loss without waiting for it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, teacher = self.forward(views, teacher_views, len(is_frequent))
        loss.backward()
        grads = [p.grad for p in self.student.parameters()]
        norms = torch._foreach_norm(grads)
        factors = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, self.clip)
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_(grads, factors)
        if freeze_last:
            self.student.head.last_layer.grad = None
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - self.momentum)
            self.update_averages(teacher, is_frequent)
        return loss.detach()


def random_views(spec: PeerSpec, batch: int, count: int, size: int, device: torch.device) -> Mapping[str, Tensor]:
    """Normalized noise: sensor -> images [B * V, C, size, size]."""
    return {s: 0.5 + 0.25 * torch.randn(batch * count, c, size, size, device=device) for s, c in spec.bands}


SHARE = 4 / 7  # expected share of the views that see a given one of three sensors


def draw(spec: PeerSpec, count: int, device: torch.device) -> Tensor:
    """Bernoulli(0.5) over the sensors given that one was drawn: bool [count, S].

    With ``spec.room`` below 1 the draws are stratified like ours (``ssl.modalities``): evenly spaced points of the
    subsets in Gray order, dealt in random order.
    """
    subsets = 2 ** len(spec.bands) - 1
    if spec.room < 1:
        points = (torch.randperm(count, device=device) + torch.rand(1, device=device)) / count
        chosen = (points * subsets).long().clamp_max(subsets - 1) + 1
        codes = (chosen ^ (chosen >> 1))[:, None]
    else:
        codes = torch.randint(1, subsets + 1, (count, 1), device=device)
    return (codes >> torch.arange(len(spec.bands), device=device)) % 2 == 1


class Bench:
    """A trainer and views that are already on the device; modalities are drawn anew every step."""

    def __init__(self, trainer: Trainer, args: argparse.Namespace):
        spec, self.device = trainer.spec, trainer.device
        self.trainer, self.batch = trainer, args.batch
        sizes = [(args.globals, args.global_size), (args.locals, args.local_size)]
        self.counts = [count for count, _ in sizes if count]
        self.images = [random_views(spec, args.batch, count, size, self.device) for count, size in sizes if count]
        self.is_frequent = torch.arange(args.batch, device=self.device) % 2 == 0
        self.loss: Any = None

    def run(self, steps: int) -> None:
        """Dispatches the steps without waiting in between, then waits for the last."""
        for _ in range(steps):
            masks = [draw(self.trainer.spec, self.batch * count, self.device) for count in self.counts]
            teacher = [(self.images[0], draw(self.trainer.spec, self.batch * self.counts[0], self.device))]
            self.loss = self.trainer.step(list(zip(self.images, masks, strict=True)), teacher, self.is_frequent)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="per repeat")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--globals", type=int, default=2)
    parser.add_argument("--locals", type=int, default=8)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--folded",
        action="store_true",
        help="our weight products for stems, fusion and projection, and stems for the views only that see a sensor",
    )
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--turns", action="store_true", help="take turns with others (benchmarks.compare)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    width, depth, heads = SIZES[args.size]
    spec = PeerSpec(
        width=width,
        depth=depth,
        heads=heads,
        prototypes=args.prototypes,
        folded=args.folded,
        room=SHARE if args.folded else 1.0,
    )
    with timing.failure_reported(args.turns):
        bench = Bench(Trainer(spec, device, getattr(torch, args.dtype), args.compile == "on"), args)
        begun = time.perf_counter()
        bench.run(1)
        first = time.perf_counter() - begun
        bench.run(args.warmup)
        turns = timing.take_turns(bench.run) if args.turns else timing.repeat(bench.run, args.steps, args.repeats)
    result = {
        "benchmark": "peer_torch",
        **{k: v for k, v in vars(args).items() if k != "turns"},
        **timing.summary(turns, args.batch),
        "first_step_seconds": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "loss": float(bench.loss),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **timing.circumstances("benchmarks.peer_torch", "torch", "triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
