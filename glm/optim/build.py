"""The optimizer of a training stage: clip, Muon on matrices, AdamW on the rest, state that can be checkpointed."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from glm.errors import NumericsError
from glm.optim.grad_norm import squared_norm
from glm.optim.muon import BUCKET_ELEMENTS, Fused, muon_flops, muon_updates
from glm.optim.newton_schulz import polynomials
from glm.optim.ownership import Cost, owners
from glm.optim.param_groups import ParamGroup, param_groups, table, whole_model_sizes
from glm.optim.placement import Placement, placement
from glm.recipe.sections import AdamWAlone, Model, Muon


class TrainOptimizer:
    """Steps the parameters of one rank from the fp32 ``main_grad`` that megatron's DDP reduces.

    Each parameter has one owner among the ranks that hold copies of it (glm.optim.ownership). Only the owner has its state
    (momentum or moments, and an fp32 master copy when the parameter is not fp32), steps it, and sends it to the others.
    """

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], settings: Muon | AdamWAlone, shape: Model):
        """``named``: this rank's parameters under the names they have in the whole model. Collective over all ranks."""
        self.settings = settings
        self.fused = fused_of(settings, shape)
        self.groups = param_groups(named, settings)
        self.device = named[0][1].device
        self.table = table(self.groups, whole_model_sizes(self.groups, self.device), settings)
        """Which rule has how many parameters of the whole model, for the log."""
        stepped = with_rules(self.groups)
        self.params = [param for _, param, _ in stepped]
        self.places = {param: placement(param) for param in self.params}
        self.owner = assign_owners(stepped, self.places, settings, self.fused)
        self.owned = [param for param in self.params if self.owner[param] == self.places[param].copies.rank()]
        self.masters = {
            param: param.detach() if param.dtype == torch.float32 else param.detach().float().clone() for param in self.owned
        }
        self.names = {param: name for name, param, _ in stepped}
        self.momenta = {
            param: torch.zeros_like(self.masters[param]) for _, param, rule in stepped if rule == "muon" and param in self.masters
        }
        self.adamw = self._build_adamw()
        self.adamw_steps = 0

    def _build_adamw(self) -> torch.optim.AdamW | None:
        settings = self.settings.adamw if isinstance(self.settings, Muon) else self.settings
        groups = [
            {
                "params": [self.masters[param] for param in group.params if param in self.masters],
                "weight_decay": self.settings.weight_decay if group.weight_decay else 0.0,
            }
            for group in self.groups if group.rule == "adamw"
        ]
        groups = [group for group in groups if group["params"]]
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
        """Norm of the gradient over the whole model, each number counted once; the same bits on all ranks."""
        squares = squared_norm([param.main_grad for param in self.params if self.places[param].counted], self.device)
        dist.all_reduce(squares)
        return squares.sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, norm: float | None = None) -> float:
        """One update at learning rate ``lr`` (Muon's; AdamW's is ``lr * adamw.lr_ratio``). Returns the unclipped norm.

        ``norm``: what ``grad_norm()`` said of this gradient, for who asked before.
        """
        norm = self.grad_norm() if norm is None else norm
        if not math.isfinite(norm):  # the norm is the same on all ranks, so all stop, and nothing was changed
            raise NumericsError(
                "gradient of this step", f"norm {norm}", "a finite number",
                "lower schedule.peak_lr or look at the data of this step; the same command continues from the last checkpoint",
            )
        clip = self.settings.clip_grad
        if clip and norm > clip and self.owned:
            torch._foreach_mul_([param.main_grad for param in self.owned], clip / (norm + 1e-6))
        self._step_muon(lr)
        self._step_adamw(lr)
        for param, master in self.masters.items():
            if param.dtype != torch.float32:
                param.copy_(master)
        self._send_to_copies()
        return norm

    def _step_muon(self, lr: float) -> None:
        """Shards of one matrix are stepped together: their ranks own the same parameters and take them in the same order."""
        settings = self.settings
        for bucket in self._muon_buckets():
            weights = [self.masters[param] for param in bucket]
            updates = muon_updates(
                [self.names[param] for param in bucket], [param.main_grad for param in bucket],
                [self.momenta[param] for param in bucket], [self.places[param].cut for param in bucket],
                fused=self.fused, momentum=settings.momentum, nesterov=settings.nesterov,
                polynomials=polynomials(settings.coefficients, settings.newton_schulz_steps), update_rms=settings.update_rms,
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[settings.newton_schulz_dtype],
            )
            torch._foreach_mul_(weights, 1 - lr * settings.weight_decay)
            torch._foreach_add_(weights, updates, alpha=-lr)

    def _muon_buckets(self) -> list[list[torch.nn.Parameter]]:
        """Owned Muon parameters, those of one shape together, experts apart (their shards are in another group)."""
        buckets: list[list[torch.nn.Parameter]] = []
        kind, room = None, 0
        for param in sorted(self.momenta, key=lambda param: (param.dim(), param.shape, self.names[param])):
            if param.dim() != kind or param.numel() > room:
                buckets.append([])
                kind, room = param.dim(), BUCKET_ELEMENTS
            buckets[-1].append(param)
            room -= param.numel()
        return buckets

    def _step_adamw(self, lr: float) -> None:
        self.adamw_steps += 1
        if not self.adamw:
            return
        for group in self.adamw.param_groups:
            group["lr"] = lr * (self.settings.adamw.lr_ratio if isinstance(self.settings, Muon) else 1.0)
        for param, master in self.masters.items():
            if param not in self.momenta:
                master.grad = param.main_grad
        self.adamw.step()

    def _send_to_copies(self) -> None:
        """Brings the new values from each owner to the ranks that hold copies, in few large messages."""
        sent: dict[tuple, list[torch.Tensor]] = {}
        for param in self.params:
            sent.setdefault((self.places[param].copies, self.owner[param]), []).append(param.detach())
        for (copies, owner), values in sent.items():
            if copies.size() > 1:
                dist._broadcast_coalesced(copies, values, 4 * BUCKET_ELEMENTS, owner)

    def _state(self) -> list[tuple[torch.nn.Parameter, str, torch.Tensor]]:
        """What this rank owns."""
        state = [(param, "momentum", momentum) for param, momentum in self.momenta.items()]
        for param, master in self.masters.items():
            if param not in self.momenta:
                state += [(param, key, self.adamw.state[master][key]) for key in ("exp_avg", "exp_avg_sq")]
            if param.dtype != torch.float32:
                state.append((param, "master", master))
        return state

    def sharded_state_dict(self, model_state: dict) -> dict:
        """State beside the model's own sharded tensors: ``optimizer.KIND.NAME`` has the sharding of NAME.

        A checkpoint says nothing of who owned what: it can be loaded under any layout.
        """
        places = get_param_id_to_sharded_param_map(model_state, iter(self.owned))
        index = {param: number for number, param in enumerate(self.owned)}
        state: dict = {"adamw_steps": self.adamw_steps}
        for param, kind, tensor in self._state():
            sharded = make_sharded_optimizer_tensor(places[index[param]], tensor, f"optimizer.{kind}")
            # the model's own tensor is written by the first of its copies, this one by its owner
            state[f"{kind}.{index[param]}"] = replace(sharded, replica_id=(*sharded.replica_id[:-1], 0))
        return state

    def load_state_dict(self, state: dict) -> None:
        """Copies loaded tensors into place, bit for bit. The parameters themselves are loaded with the model."""
        index = {param: number for number, param in enumerate(self.owned)}
        for param, kind, tensor in self._state():
            tensor.copy_(state[f"{kind}.{index[param]}"])
        self.adamw_steps = state["adamw_steps"]
        if self.adamw:
            for entry in self.adamw.state.values():
                entry["step"].fill_(self.adamw_steps)

    def masters_from_params(self) -> None:
        """Takes over weights that were loaded without optimizer state."""
        for param, master in self.masters.items():
            if param.dtype != torch.float32:
                master.copy_(param.detach())


def fused_of(settings: Muon | AdamWAlone, shape: Model) -> Fused:
    return Fused.of(shape, settings.split) if isinstance(settings, Muon) else Fused.of(shape)


def with_rules(groups: list[ParamGroup]) -> list[tuple[str, torch.nn.Parameter, str]]:
    """(name, parameter, rule) of the parameters that are trained."""
    return [(name, param, group.rule) for group in groups if group.rule != "frozen" for name, param in zip(group.names, group.params)]


def assign_owners(
    stepped: list[tuple[str, torch.nn.Parameter, str]], places: dict[torch.nn.Parameter, Placement], settings: Muon | AdamWAlone, fused: Fused,
) -> dict[torch.nn.Parameter, int]:
    """The owner of each parameter, as a rank of the group of its copies."""
    owner = {}
    for copies in dict.fromkeys(place.copies for place in places.values()):
        members = [item for item in stepped if places[item[1]].copies is copies]
        costs = [cost(item, places[item[1]], settings, fused) for item in members]
        owner |= {param: rank for (_, param, _), rank in zip(members, owners(costs, copies.size()))}
    return owner


def cost(item: tuple[str, torch.nn.Parameter, str], place: Placement, settings: Muon | AdamWAlone, fused: Fused) -> Cost:
    """What (name, parameter, rule) costs its owner; the shards of a cut parameter share the operations."""
    name, param, rule = item
    return Cost(muon_flops(name, param, place.cut, fused, settings.newton_schulz_steps) if rule == "muon" else 0, state_bytes(param, rule))


def state_bytes(param: torch.nn.Parameter, rule: str) -> int:
    """Momentum or two moments in fp32, and a master copy of what is not fp32."""
    return ((4 if rule == "muon" else 8) + (0 if param.dtype == torch.float32 else 4)) * param.numel()
