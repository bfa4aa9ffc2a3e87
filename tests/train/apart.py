"""How much the outputs of one document depend on the inputs of another, by gradient, on these ranks:
``python -m tests.train.apart OUT CASE``; rank 0 writes OUT/found.json."""

import json
import os
import sys
from pathlib import Path

from glm import platform

DOCUMENTS = [20, 3, 9, 24, 8]


def found(case) -> dict:
    """{what: [largest gradient at other documents, smallest over documents of the largest gradient at their own]}, over all ranks."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from glm.model.chunks import named_modules
    from glm.train.batch import context_part, packed_batch, plain_batch
    from glm.train.separation import check_documents_apart
    from tests.layout.training import SHAPE, trainer

    one, _ = trainer(case, losses={"sequence_balance_weight": 0.0})    # its gradient comes whatever is differentiated
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE.vocab_size, (sum(DOCUMENTS) + 1,), generator=generator)
    if case.packed:
        number = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
        made = packed_batch([ids[:-1]], [ids[1:]], [torch.ones(len(number))], DOCUMENTS, torch.device("cpu"), {"document": [number]})
    else:
        rows = [ids[:16], ids[16:32], ids[32:48]]
        made = plain_batch(rows, rows, [torch.ones(16)] * 3, torch.device("cpu"), {"document": [torch.full((16,), row) for row in range(3)]})
    part = context_part(made, parallel_state.get_context_parallel_rank(), case.cp)
    (model,) = one.chunks
    inputs, outputs = [], []
    modules = dict(named_modules(one.chunks))
    modules["embedding"].register_forward_hook(lambda module, given, result: inputs.append(result))
    modules["mtp"].register_forward_hook(lambda module, given, result: outputs.append(result.chunk(2, dim=0)[1]))
    model.train()
    model.mtp_weight = 0.3
    modules["decoder"].register_forward_hook(lambda module, given, result: outputs.append(result))
    model(input_ids=part.token_ids, position_ids=part.position_ids, attention_mask=None, labels=part.labels, loss_mask=part.loss_mask,
          packed_seq_params=part.documents)
    document = part.extra["document"].t()
    told = {}
    for name, output in zip(("trunk", "MTP layer"), outputs, strict=True):
        across, within = torch.zeros(()), torch.full((), torch.inf)
        for number in range(int(made.extra["document"].max()) + 1):
            inside = document == number
            gradients = torch.autograd.grad((output * inside[..., None]).square().sum(), inputs, retain_graph=True, allow_unused=True)
            sizes = sum(gradient.abs().amax(-1) for gradient in gradients if gradient is not None)
            own = (sizes * inside).max()
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
            across, within = torch.maximum(across, (sizes * ~inside).max()), torch.minimum(within, own)
        dist.all_reduce(across, op=dist.ReduceOp.MAX)
        told[name] = [across.item(), within.item()]
    return told | ({"line": check_documents_apart(one)} if case.packed else {})


def main(out: Path, case: str) -> None:
    platform.activate("host")

    import torch.distributed as dist

    from tests.layout.cases import Case

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world_size)
    told = found(Case.from_json(json.loads(case)))
    if rank == 0:
        (out / "found.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
