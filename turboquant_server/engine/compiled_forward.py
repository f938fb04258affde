"""CompiledForward: the forward of a model that attends on the store, compiled once for steps of any size.

Attention stays one operation, which finds the store and the plan of a step when it runs. So it does not
matter whether tokens are parts of prompts or one of each request: they go through the model in one row, and
the code takes any number of them. All that steps need is compiled and tried out when a server starts, and
nothing later. Knows no requests.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import logging
import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, fx

from turboquant_core import AttentionOptions, PassThroughCache, forward_context, traceable_forward
from turboquant_server.engine.joint_linear import join_linears, lay_together
from turboquant_server.engine.model_forward import ModelForward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What compiles, by the type of the device. For a CPU it would take minutes.
BACKENDS = {"cuda": "inductor"}
# Tokens and wanted logits of the forward that is traced; numbers that torch does not take for each other, or
# for multiples of something.
NUM_TRACED = (1021, 13)
# Root mean square of the error of the logits over their standard deviation; in 16 bits, experts chosen
# differently can make it large for good reasons.
MAX_ERROR_FLOAT32 = 1e-4
MAX_ERROR_16_BIT = 0.2

logger = logging.getLogger(__name__)


class _NotCompiledError(RuntimeError):
    """There is no code for a forward of this size."""


class CompiledForward:
    """Run the compiled forward of a model.

    Args:
        model: Without states, attending on the store.
        backend: Of torch.compile.
        max_num_tokens: Most tokens of a step.

    Raises:
        Exception: The forward cannot be compiled, or gives other logits then.
    """

    def __init__(self, model: PreTrainedModel, backend: str, max_num_tokens: int) -> None:
        self._model = model
        self._uncompiled = uncompiled = ModelForward(model)
        self._cache = cache = PassThroughCache(model.config)
        self._has_warned = False

        def forward(input_ids: Tensor, position_ids: Tensor, wanted: Tensor) -> Tensor:
            if not torch.compiler.is_dynamo_compiling():
                raise _NotCompiledError(f"nothing is compiled for {input_ids.shape[1]} tokens")
            return uncompiled(input_ids, position_ids, wanted, cache)

        # What is compiled belongs to a code object, and this one would be that of all models.
        forward.__code__ = forward.__code__.replace()
        self._compile = torch.compile(forward, fullgraph=True, backend=_Backend(backend))
        self._run = torch._dynamo.run(forward)  # compiles nothing
        self._prepare(max_num_tokens)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor) -> Tensor:
        """Run the model in the current forward context.

        Args:
            input_ids: ``[1, num_tokens]`` or ``[num_rows, 1]``.
            position_ids: The same of their positions.
            wanted: ``[num_wanted]``, places in each row whose logits are needed.

        Returns:
            Logits ``[num_rows, num_wanted, vocab_size]``.
        """
        num_rows, num_tokens = input_ids.shape
        if num_rows > 1:
            assert num_tokens == 1, "several rows are one token of each request"
            wanted = torch.arange(num_rows, device=wanted.device)
        arguments = input_ids.view(1, -1), position_ids.view(1, -1), wanted
        try:
            logits: Tensor = self._run(*arguments)
        except _NotCompiledError as error:
            if not self._has_warned:
                logger.warning("a step runs uncompiled: %s", error)
            self._has_warned = True
            logits = self._uncompiled(*arguments, self._cache)
        return logits.view(num_rows, -1, logits.shape[-1])

    def _prepare(self, max_num_tokens: int) -> None:
        """Compile what steps need, and compare what it computes with the model."""
        small, traced = self._example(2, 1), self._example(*NUM_TRACED)

        def run() -> Tensor:
            with traceable_forward(_TokenAttention()):
                return self._uncompiled(*small, self._cache)

        expected = lay_together(self._model, run)
        for tensor in traced:
            torch._dynamo.mark_dynamic(tensor, tensor.dim() - 1)
        # Otherwise torch would compile for at least two tokens and two logits.
        shape_config: Any = torch.fx.experimental._config
        with shape_config.patch(backed_size_oblivious=True):
            self._try(self._compile, traced)
        # There are models that have branches for one token, and get code of their own for it.
        self._try(self._compile, self._example(1, 1))
        self._compare(small, expected)
        for counts in (NUM_TRACED, (1, 1), (2, 2), (max_num_tokens, 1), (max_num_tokens, 2)):
            arguments = self._example(*counts)
            self._compare(arguments, self._try(self._uncompiled, (*arguments, self._cache)))

    def _compare(self, arguments: tuple[Tensor, Tensor, Tensor], expected: Tensor) -> None:
        expected = expected.double()
        error = (self._try(self._run, arguments).double() - expected).square().mean().sqrt()
        limit = MAX_ERROR_FLOAT32 if self._model.dtype == torch.float32 else MAX_ERROR_16_BIT
        if not error <= limit * expected.std():
            share = float(error / expected.std())
            raise RuntimeError(f"its logits are off by {share:.1g} of their standard deviation")

    def _example(self, num_tokens: int, num_wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return arguments of a forward: tokens from all over the vocabulary, the last places wanted."""
        embeddings: Any = self._model.get_input_embeddings()
        places = torch.arange(num_tokens, device=self._model.device)
        # Not from the first, which may stand for padding and have an embedding of zeros.
        input_ids = (places + 1) * 7919 % embeddings.num_embeddings
        return input_ids[None], places[None] % 61, places[-num_wanted:].clone()

    def _try(self, forward: Any, arguments: tuple[Any, ...]) -> Tensor:
        with forward_context(_TokenAttention()):
            logits: Tensor = forward(*arguments)
        return logits


class _Backend:
    """Compile a traced graph once it is prepared."""

    def __init__(self, name: str) -> None:
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        join_linears(module, inputs)
        _separate(module.graph)
        _hold_angles(module.graph)
        module.recompile()
        return self._compile(module, inputs)


def _separate(graph: fx.Graph) -> None:
    """Give a concatenation of a tensor with itself, as of rotary embeddings, copies of it.

    Otherwise inductor repeats the tensor, and has to know whether it is of one token to do so.
    """
    for node in graph.find_nodes(op="call_function", target=torch.cat):
        first, *rest = node.args[0]
        for index, part in enumerate(rest):
            if part is first:
                with graph.inserting_before(node):
                    rest[index] = graph.call_function(torch.clone, (first,))
                rest[index].meta = first.meta.copy()
        node.args = ([first, *rest], *node.args[1:])


def _hold_angles(graph: fx.Graph) -> None:
    """Have sines and cosines that several layers read computed once.

    Otherwise inductor, which takes them for cheap, has each layer compute them again for each of its heads.
    On an H200 and the 32 layers of an 8B Llama this takes 0.2 of 5.3 ms for one token, 5 of 250 ms for 8,192.
    """
    for node in list(graph.nodes):
        if node.target not in ("cos", "sin", torch.cos, torch.sin):
            continue
        angles = node
        while len(angles.users) == 1 and (user := next(iter(angles.users))).target in ("to", operator.mul):
            angles = user
        if len(angles.users) > 1:
            readers = list(angles.users)
            with graph.inserting_after(angles):
                held = graph.call_function(torch.ops.turboquant.held.default, (angles,))
            held.meta = angles.meta.copy()
            for reader in readers:
                reader.replace_input_with(angles, held)


class _TokenAttention:
    """Stands for attention where there is no store: mixes a token's own states, in each layer otherwise."""

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        group_size = queries.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(group_size, dim=1) for states in (keys, values))
        scores = (queries.float() * keys.float()).sum(-1) * options.softmax_scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.sink_scores is not None:
            scores = scores - options.sink_scores.float()
        weights = scores.sigmoid() / (1 + layer_idx % 3 + writes)
        return (weights.unsqueeze(-1) * values).to(queries.dtype)


@torch.inference_mode()
def compile_forward(model: PreTrainedModel, max_num_tokens: int) -> CompiledForward | None:
    """Compile the forward of a model.

    Args:
        model: Without states, attending on the store.
        max_num_tokens: Most tokens of a step.

    Returns:
        None where models are not compiled, or, with a line in the log, if this one cannot be.
    """
    backend = BACKENDS.get(model.device.type)
    if backend is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of while it compiles is not the user's doing
            return CompiledForward(model, backend, max_num_tokens)
    except Exception as error:  # whatever a model does that cannot be traced
        logger.debug("compiling failed", exc_info=True)
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0]
        logger.warning("the model runs uncompiled: %s (%s)", reason, type(cause).__name__)
        return None
    finally:
        torch.cuda.empty_cache()  # of where weights lay before


_library = torch.library.Library("turboquant", "FRAGMENT")
_library.define("held(Tensor numbers) -> Tensor")
_library.impl("held", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("turboquant::held", torch.empty_like, lib=_library)
