"""The optimizer of a training stage: clip, Muon on matrices, AdamW on the rest, state that can be checkpointed."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from glm.errors import NumericsError
from glm.optim.muon import HeadShape, muon_updates
from glm.optim.param_groups import ParamGroup, param_groups
from glm.recipe.sections import Model, Muon


class TrainOptimizer:
    """Steps the parameters of one rank from the fp32 ``main_grad`` that megatron's DDP reduces.

    Parameters that are not fp32 keep an fp32 master copy, which is what is stepped and saved.
    """

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], settings: Muon, shape: Model):
        self.settings = settings
        self.groups: list[ParamGroup] = param_groups(named, settings.frozen)
        self.heads = HeadShape(shape.num_attention_heads // shape.num_query_groups * shape.head_dim, shape.head_dim)
        self.params = [param for group in self.groups if group.rule != "frozen" for param in group.params]
        self.masters = {
            param: param.detach() if param.dtype == torch.float32 else param.detach().float().clone()
            for param in self.params
        }
        self.muon = next((group for group in self.groups if group.rule == "muon"), None)
        self.momenta = [torch.zeros_like(self.masters[param]) for param in self.muon.params] if self.muon else []
        self.adamw = self._build_adamw()

    def _build_adamw(self) -> torch.optim.AdamW | None:
        settings = self.settings.adamw
        groups = [
            {
                "params": [self.masters[param] for param in group.params],
                "weight_decay": self.settings.weight_decay if group.weight_decay else 0.0,
            }
            for group in self.groups if group.rule == "adamw"
        ]
        if not groups:
            return None
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
        for group in adamw.param_groups:  # allocated now, so that a checkpoint's structure does not depend on steps done
            for param in group["params"]:
                adamw.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        return adamw

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Norm of the gradient over the whole model: dense gradients are equal on all ranks, experts are spread over EP."""
        device = self.params[0].device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for index, expert in enumerate((False, True)):
            grads = [p.main_grad for p in self.params if getattr(p, "is_stacked_expert", False) == expert]
            if grads:
                squares[index] = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        dist.all_reduce(squares[1], group=parallel_state.get_expert_model_parallel_group())
        return squares.sum().sqrt().item()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update at learning rate ``lr`` (Muon's; AdamW's is ``lr * adamw.lr_ratio``). Returns the unclipped norm."""
        settings = self.settings
        norm = self.grad_norm()
        if not math.isfinite(norm):  # the norm is the same on all ranks, so all stop, and nothing was changed
            raise NumericsError(
                "gradient of this step", f"norm {norm}", "a finite number",
                "lower schedule.peak_lr or look at the data of this step; the same command continues from the last checkpoint",
            )
        if settings.clip_grad and norm > settings.clip_grad:
            torch._foreach_mul_([param.main_grad for param in self.params], settings.clip_grad / (norm + 1e-6))
        if self.muon:
            weights = [self.masters[param] for param in self.muon.params]
            updates = muon_updates(
                self.muon.names, weights, [param.main_grad for param in self.muon.params], self.momenta,
                heads=self.heads, momentum=settings.momentum, nesterov=settings.nesterov,
                steps=settings.newton_schulz_steps, update_rms=settings.update_rms,
            )
            torch._foreach_mul_(weights, 1 - lr * settings.weight_decay)
            torch._foreach_add_(weights, updates, alpha=-lr)
        if self.adamw:
            for group in self.adamw.param_groups:
                group["lr"] = lr * settings.adamw.lr_ratio
            for param in self.params:
                if self.masters[param] in self.adamw.state:
                    self.masters[param].grad = param.main_grad
            self.adamw.step()
        for param, master in self.masters.items():
            if param.dtype != torch.float32:
                param.copy_(master)
        return norm

    def _named_state(self) -> list[tuple[torch.nn.Parameter, str, torch.Tensor]]:
        state = [(param, "momentum", buffer) for param, buffer in zip(self.muon.params, self.momenta)] if self.muon else []
        for param in self.params:
            master = self.masters[param]
            if self.adamw and master in self.adamw.state:
                state += [(param, key, self.adamw.state[master][key]) for key in ("exp_avg", "exp_avg_sq")]
            if param.dtype != torch.float32:
                state.append((param, "master", master))
        return state

    def sharded_state_dict(self, model_state: dict) -> dict:
        """State beside the model's own sharded tensors: ``optimizer.KIND.NAME`` has the sharding of NAME."""
        sharded = get_param_id_to_sharded_param_map(model_state, iter(self.params))
        index = {id(param): number for number, param in enumerate(self.params)}
        return {
            f"{kind}.{index[id(param)]}": make_sharded_optimizer_tensor(sharded[index[id(param)]], tensor, f"optimizer.{kind}")
            for param, kind, tensor in self._named_state()
        } | {"adamw_steps": self._adamw_steps()}

    def load_state_dict(self, state: dict) -> None:
        """Copies loaded tensors into place, bit for bit."""
        index = {id(param): number for number, param in enumerate(self.params)}
        for param, kind, tensor in self._named_state():
            tensor.copy_(state[f"{kind}.{index[id(param)]}"])
        if self.adamw:
            for entry in self.adamw.state.values():
                entry["step"].fill_(state["adamw_steps"])
        for param, master in self.masters.items():
            if param.dtype != torch.float32:
                param.data.copy_(master)

    def masters_from_params(self) -> None:
        """Takes over weights that were loaded without optimizer state."""
        for param, master in self.masters.items():
            if param.dtype != torch.float32:
                master.copy_(param.detach())

    def _adamw_steps(self) -> int:
        if not self.adamw:
            return 0
        return int(next(iter(self.adamw.state.values()))["step"].item())
