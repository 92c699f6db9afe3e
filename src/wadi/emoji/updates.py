"""One update of AdamW with an average of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class AveragedAdamW:
    """AdamW on parameters whose average is what ships; nothing in it waits for the device.

    Args:
        parameters: what is trained, all on `device`.
        ema_decay: of the average, once it is under way.
        device: where.

    Attributes:
        parameters: the list of them.
        ema: their averages, in the same order.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], ema_decay: float, device: torch.device):
        self.parameters, self.ema_decay = list(parameters), ema_decay
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.learning_rate = torch.tensor(0.0, device=device)
        self.ema_weight = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.learning_rate,
            weight_decay=1e-3,
            betas=(0.9, 0.99),
            capturable=device.type == "cuda",
            fused=True,
        )

    def prepare(self, step: int, rate: float) -> None:
        """Set the learning rate and the weight of the average, which starts quickly: (1 + n) / (10 + n)."""
        self.learning_rate.fill_(rate)
        self.ema_weight.fill_(1 - min(self.ema_decay, (1 + step) / (10 + step)))

    def __call__(self, loss: torch.Tensor) -> None:
        """Backward, clip to norm 1, update, average."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters if p.grad is not None], 1.0, foreach=True
        )
        # a gradient that is not finite changes nothing: fused AdamW's own mask, which needs no wait
        self.optimizer.found_inf = norm.isfinite().logical_not().float()
        self.optimizer.step()
        # ema += (1 - decay) (parameters - ema); a lerp with a tensor as weight would wait for the device.
        change = torch._foreach_sub([parameter.detach() for parameter in self.parameters], self.ema)
        torch._foreach_mul_(change, self.ema_weight)
        torch._foreach_add_(self.ema, change)
