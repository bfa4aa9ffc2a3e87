"""What megatron does by default where it is silently wrong, put back in place of ours: the comparison must notice.

A trap is a function of the process that changes classes before a trainer is built; it lives in a process of its own case.
"""

from contextlib import contextmanager
from unittest import mock

from megatron.core.transformer.moe.router import TopKRouter

from glm.model import config
from glm.model.experts import StackedExperts
from glm.model.router import SigmoidRouter
from glm.train import step as train_step


@contextmanager
def expert_gradients_in_the_dense_group():
    """tensor_parallel/layers.py:829: without expert parallelism experts are reduced like dense weights, which TP ranks share."""
    build = StackedExperts.__init__

    def default(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.allreduce = self.ep_size == 1

    with mock.patch.object(StackedExperts, "__init__", default):
        yield


@contextmanager
def balance_weight_by_local_tokens():
    """router.py:466 and moe_utils.py:231: the balance loss is weighted by the tokens of one row on this rank."""
    with mock.patch.object(SigmoidRouter, "attach_and_log_load_balancing_loss", TopKRouter.attach_and_log_load_balancing_loss):
        yield


@contextmanager
def loss_in_two_parts():
    """schedules.py:268: a mean over this rank's tokens is multiplied by the context-parallel size."""
    fields = config.transformer_config

    def default(*args, **kwargs):
        made = fields(*args, **kwargs)
        made.calculate_per_token_loss = False
        return made

    run = train_step.Trainer._run

    def with_two_parts(self, batches, loss, forward_only):
        def mean(losses, batch):
            total, count, metrics = loss(losses, batch)
            return total / count.clamp(min=1), metrics
        return run(self, batches, mean, forward_only)

    with (
        mock.patch.object(config, "transformer_config", default), mock.patch.object(train_step.Trainer, "_run", with_two_parts),
        mock.patch.object(train_step.Trainer, "_per_token", lambda self, loss: loss),
        mock.patch.object(SigmoidRouter, "attach_and_log_load_balancing_loss", TopKRouter.attach_and_log_load_balancing_loss),
    ):
        yield


@contextmanager
def batched_messages_between_two_interleaved_stages():
    """p2p_communication.py:57: messages of both directions between the same two ranks are matched by their order alone."""
    fields = config.transformer_config

    def default(*args, **kwargs):
        made = fields(*args, **kwargs)
        made.overlap_p2p_comm, made.batch_p2p_comm = False, True
        return made

    with mock.patch.object(config, "transformer_config", default):
        yield


TRAPS = {
    trap.__name__: trap for trap in (
        expert_gradients_in_the_dense_group, balance_weight_by_local_tokens, loss_in_two_parts,
        batched_messages_between_two_interleaved_stages,
    )
}
