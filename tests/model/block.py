"""A small network whose linear layers take adapters, and all that a step of it gives."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients; dropout is drawn alike in every call."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().pow(2).mean().backward()
    found = {"output": y.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
