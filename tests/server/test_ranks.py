"""What ranks tell each other, how they notice that they differ, and which models they can share."""

from __future__ import annotations

import copy
import json
import weakref
from typing import Any

import architectures
import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from turboquant_server import tensor_parallel
from turboquant_server.config import ServerConfig
from turboquant_server.engine import ranks
from turboquant_server.engine.followers import Followers
from turboquant_server.engine.grammar import GrammarCompiler, GrammarError, GrammarKind
from turboquant_server.engine.messages import Abort, Add, RanksDisagreeError, Step, dump, load
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.load_error import ModelLoadError
from turboquant_server.tensor_parallel import check_devices, check_model

pytestmark = pytest.mark.usefixtures("no_variables")


class Told:
    """Stands for an engine, whose state is how often it has been told something."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.scheduler = self
        self.waiting: list[Any] = []
        self.running: list[Any] = []

    @property
    def num_preemptions(self) -> int:
        return len(self.heard)

    def add_request(self, *arguments: Any) -> None:
        self.heard.append(arguments)

    def abort_request(self, request_id: str) -> None:
        self.heard.append(request_id)


def test_a_step_is_the_same_in_another_process(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    compilers = [GrammarCompiler(tiny_tokenizer, len(tiny_tokenizer), {0}) for _ in range(2)]
    grammar = compilers[0].compile(GrammarKind.JSON_SCHEMA, json.dumps({"type": "object"}))
    params = SamplingParams(max_tokens=5, stop=("x",), seed=7)
    constrained = SamplingParams(max_tokens=5, grammar=grammar)
    messages = [Add("1", [1, 2], params, "salt"), Abort("0"), Add("2", [3], constrained, "")]
    step = load(dump(Step(messages, (3, 0))), compilers[1].compile)
    assert list(step.messages[:2]) == messages[:2]
    other = step.messages[2]
    assert isinstance(other, Add) and other.sampling_params.grammar is not None
    assert other.sampling_params.grammar.source == grammar.source
    assert other.sampling_params.grammar is not grammar
    engine: Any = Told()
    step.apply(engine)
    assert engine.heard == [("1", [1, 2], params, "salt"), "0", ("2", [3], other.sampling_params, "")]


def test_an_engine_in_another_state_is_noticed() -> None:
    engine: Any = Told()
    with pytest.raises(RanksDisagreeError, match=r"state \(1, 0\), the first one in \(2, 0\)"):
        Step([Abort("0")], (2, 0)).apply(engine)


def test_a_rank_survives_only_what_all_have() -> None:
    ALONE.check_shared(RuntimeError())
    two = Ranks(0, 2, torch.device("cpu"))
    two.check_shared(GrammarError())
    with pytest.raises(torch.OutOfMemoryError):
        two.check_shared(torch.OutOfMemoryError())


def test_what_the_engine_held_is_gone_when_ranks_part(monkeypatch: pytest.MonkeyPatch) -> None:
    followers = Followers(1, torch.device("cpu"), None)
    engine: Any = type("Engine", (), {})()
    engine.itself = engine
    followers.on_failure = engine.fail = lambda engine=engine: None
    seen: list[object] = []
    held, leave = weakref.ref(engine), followers.ranks.leave
    del engine
    monkeypatch.setattr(followers.ranks, "leave", lambda: (seen.append(held()), leave()))
    followers.end()
    assert seen == [None]


def test_ranks_that_part_leave_the_cores_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "destroy_process_group", "TCPStore"):
        monkeypatch.setattr(ranks.dist, name, lambda *arguments, **options: None)
    for name in ("LOCAL_RANK", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(2):
            two = Ranks(0, 2, torch.device("cpu"))
            two.join()
            assert torch.get_num_threads() == 2
            two.leave()
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize(
    ("options", "num_gpus", "message"),
    [
        ({}, 1, "needs 2 GPUs and PyTorch sees 1; give 1 or less"),
        ({"device": "cuda"}, 0, "needs 2 NVIDIA GPUs and PyTorch sees none"),
        ({"device": "cuda:1"}, 4, "takes the first 2 GPUs; start without --device cuda:1"),
        ({"device": "cpu"}, 2, "set CUDA_VISIBLE_DEVICES to nothing"),
        ({"quantize": "int8"}, 2, "--quantize int8 is for one GPU"),
        ({"swap_space": 2**30}, 2, "--swap-space is for one GPU"),
        ({"fidelity_sample_rate": 0.1}, 2, "--fidelity-sample-rate is for one GPU"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], num_gpus: int, message: str
) -> None:
    monkeypatch.setattr(tensor_parallel.torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ModelLoadError, match=message):
        check_devices(ServerConfig(tensor_parallel_size=2, **options))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(tensor_parallel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"install it with: pip install accelerate$"):
        check_devices(ServerConfig(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("llama", 3, "m has 2 key/value heads, which 3 GPUs cannot share evenly"),
        ("phi", 4, "m has 2 key/value heads"),
        ("phi3", 2, "no plan that divides the heads of phi3 models"),
        ("gpt_oss", 2, "no plan that divides the heads of gpt_oss models"),
        ("stablelm", 2, "no plan that divides the heads of stablelm models"),
        ("bloom", 2, "no plan that divides the heads of bloom models"),
        ("qwen3_next", 2, "m has recurrent layers"),
    ],
)
def test_models_whose_heads_cannot_be_shared_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        check_model("m", config_of(name), size)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "mixtral", "gemma3_text", "mistral"])
def test_models_whose_heads_can_be_shared_are_not(name: str) -> None:
    check_model("m", config_of(name), 2)


def config_of(name: str) -> Any:
    options = copy.deepcopy(architectures.ARCHITECTURES[name].options)
    return AutoConfig.for_model(**{"model_type": name, **architectures.BASE, **options})
