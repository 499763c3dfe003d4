"""Muon optimizer: momentum with orthogonalised updates (Jordan et al. 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton–Schulz iteration, from the paper."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the approximate nearest semi-orthogonal matrices: [count, rows, columns]."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Optimizer for weight matrices and stacks; matrices of equal shape are updated together."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                shape = parameter.shape[-2:]
                shapes[shape].append((parameter, update.reshape(-1, *shape)))
            for (rows, columns), members in shapes.items():
                step = orthogonalize(torch.cat([update for _, update in members]))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                pieces = step.split([len(update) for _, update in members])
                for (parameter, _), piece in zip(members, pieces, strict=True):
                    parameter.add_(piece.view_as(parameter), alpha=-scale)
