"""Batches with routes in engines of verl that replay none: the policy's is refused, and every other goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from router_replay.errors import DataError, UnsupportedError
from router_replay_adapters.verl.packed import KEY
from router_replay_adapters.verl.unreplayed import refuse_experts_without_replay

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything that may import Megatron)

# isort: split
import router_replay_adapters.verl  # noqa: F401

# isort: split
from megatron.core.transformer.moe.router import TopKRouter
from verl.utils import tensordict_utils as tu
from verl.utils.megatron.router_replay_patch import RouterReplayAction
from verl.workers import engine_workers
from verl.workers.config import TrainingWorkerConfig
from verl.workers.config.engine import FSDPEngineConfig, McoreEngineConfig
from verl.workers.engine.base import BaseEngine
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead, MegatronEngineWithValueHead

POLICY, CRITIC = "language_model", "value_model"


class OwnReplay(FSDPEngineWithLMHead):
    """As verl's engine of VeOmni, which needs VeOmni to be imported."""


def batch(*fields: str) -> TensorDict:
    """Two samples with these routes; masks are there also where nothing was sampled."""
    made = TensorDict({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, batch_size=[2])
    if "routed_experts" in fields:
        made["routed_experts"] = torch.zeros(2, 3, 1, 2, dtype=torch.int16)
    if KEY in fields:
        tu.assign_non_tensor_stack(made, KEY, [b"masks", None])
    return made


def train(kind: type[BaseEngine], data: TensorDict, model_type: str = POLICY, **attributes: Any) -> dict[str, Any]:
    """What verl's own `train_batch` returns, of an engine whose passes and optimizer do nothing."""
    engine: Any = kind.__new__(kind)
    needed: dict[str, Any] = {
        "model_config": SimpleNamespace(model_type=model_type),
        "optimizer_zero_grad": lambda: None,
        "forward_backward_batch": lambda data, loss_function, forward_only: {"metrics": {}},
        "optimizer_step": lambda: 0.5,
        "is_mp_src_rank_with_outputs": lambda: True,
    }
    vars(engine).update({**needed, **attributes})
    return engine.train_batch(data, loss_function=None)["metrics"]


STEPPED = {"grad_norm": 0.5}


@pytest.mark.parametrize("field", [KEY, "routed_experts"])
def test_a_policy_whose_engine_replays_nothing_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        train(FSDPEngineWithLMHead, batch(field))
    told = str(error.value)
    assert f"has {field!r}, and its engine, verl's FSDPEngineWithLMHead, replays none" in told
    assert "strategy=megatron" in told and "hf_router_replay" in told and "enable_rollout_routing_replay away" in told
    assert ("veomni" in told) == (field == "routed_experts")


def test_weights_of_a_refused_step_stay_as_they_are() -> None:
    stepped: list[bool] = []
    with pytest.raises(UnsupportedError):
        train(FSDPEngineWithLMHead, batch(KEY), optimizer_step=lambda: stepped.append(True))
    assert not stepped


def test_batches_without_routes_are_trained_on_as_ever() -> None:
    assert train(FSDPEngineWithLMHead, batch()) == STEPPED


@pytest.mark.parametrize("field", [KEY, "routed_experts"])
@pytest.mark.parametrize("kind", [FSDPEngineWithValueHead, MegatronEngineWithValueHead])
def test_a_critic_gets_the_policys_batches(kind: type[BaseEngine], field: str) -> None:
    assert train(kind, batch(field), CRITIC) == STEPPED


@pytest.mark.parametrize("field", [KEY, "routed_experts"])
def test_microbatches_of_verls_megatron_engine_are_looked_at_in_its_forward_step(field: str) -> None:
    assert train(MegatronEngineWithLMHead, batch(field)) == STEPPED


def test_an_engine_with_a_replay_of_its_own_takes_experts() -> None:
    assert train(OwnReplay, batch("routed_experts"), enable_routing_replay=True) == STEPPED
    with pytest.raises(UnsupportedError, match=r"or by veomni with its router_replay\.mode=R3"):
        train(OwnReplay, batch("routed_experts"), enable_routing_replay=False)
    with pytest.raises(UnsupportedError, match="has 'routing_masks', and its engine, verl's OwnReplay, replays none"):
        train(OwnReplay, batch(KEY), enable_routing_replay=True)


class Chunk(torch.nn.Module):
    """A model chunk with a router for each action, as verl finds them."""

    def __init__(self, *actions: RouterReplayAction | None) -> None:
        super().__init__()
        self.decoder = torch.nn.ModuleList()
        for number, action in enumerate(actions, 1):
            router = TopKRouter.__new__(TopKRouter)
            torch.nn.Module.__init__(router)
            router.layer_number = number
            router.router_replay = SimpleNamespace(router_replay_action=action)
            self.decoder.append(router)


def test_verls_own_replay_has_to_be_on_in_every_pass() -> None:
    engine = SimpleNamespace(enable_routing_replay=True)
    told = (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD, RouterReplayAction.RECORD)
    for model in (Chunk(*told), Chunk()):
        refuse_experts_without_replay(engine, batch("routed_experts"), model)
    refuse_experts_without_replay(engine, batch(), Chunk(None))
    with pytest.raises(DataError, match="verl's routers were not told to replay them in this pass"):
        refuse_experts_without_replay(engine, batch("routed_experts"), Chunk(*told, None))


@pytest.mark.parametrize("config", [FSDPEngineConfig, McoreEngineConfig])
def test_verls_worker_tells_engines_what_kind_of_model_they_have(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the configuration of the model says: critics have the policy's."""
    made: list[Any] = []

    def new(model_type: str, model_config: Any, **others: Any) -> Any:
        made.append(model_config.model_type)
        return SimpleNamespace(get_data_parallel_rank=lambda: 0, is_mp_src_rank_with_outputs=lambda: True)

    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("verl.workers.engine.EngineRegistry.new", new)
    for name in ("initialize_global_process_group_ray", "set_numa_affinity"):
        monkeypatch.setattr(engine_workers, name, lambda **_: None)
    model_config = SimpleNamespace(model_type=POLICY, get=lambda name, default: default)
    given = TrainingWorkerConfig(model_type=CRITIC, model_config=model_config, engine_config=config())
    engine_workers.TrainingWorker(config=given)
    assert made == [CRITIC]
