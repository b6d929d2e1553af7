"""Any decoder-only model of transformers, its attention replaced by ours.

transformers lets an attention function be registered under a name, which modules then look up by
their configuration. Keyword arguments of the model's call reach that function through all modules
that support this (`_supports_attention_backend`), as transformers' own continuous batching relies
on as well: that is how a step's attention reaches each layer.

No function is registered for building masks: transformers then builds none.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import AttentionInterface, PreTrainedModel

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionBackend, Plan
from services.worker.engine.models.few_rows import FewRows

ATTENTION_NAME = "djinn"

_log = logging.getLogger(__name__)

# What modules pass along without it changing how a layer attends.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "layer_idx"})


class LayerAttention:
    """One step's attention, handed to every layer as the keyword argument ``djinn``."""

    def __init__(self, backend: AttentionBackend, plan: Plan) -> None:
        self._attend = backend.attend
        self._plan = plan

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attends; heads come before tokens, as transformers has them, and after in the result."""
        out = self._attend(
            self._plan,
            layer,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            scale,
        )
        return out.unsqueeze(0)


class CheckedAttention(LayerAttention):
    """Attends, and refuses what a layer asks for that no backend here does.

    Attributes:
        layers: Index of each layer that has attended, in order.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        plan: Plan,
        *,
        kv_heads: int,
        head_dim: int,
        max_context_length: int,
    ) -> None:
        """Binds it to a step.

        Args:
            backend: Attends.
            plan: The backend's plan of the step.
            kv_heads: Heads that each layer's K and V must have.
            head_dim: Elements that each head of Q, K and V must have.
            max_context_length: A sliding window at least this long changes nothing.
        """
        super().__init__(backend, plan)
        self.layers: list[int] = []
        self._kv_shape = (kv_heads, head_dim)
        self._max_context_length = max_context_length

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """See `LayerAttention.attend`; raises `ConfigError` for shapes the pool does not have."""
        for name, tensor in (("K", key), ("V", value)):
            shape = (tensor.shape[1], tensor.shape[3])
            if shape != self._kv_shape:
                raise ConfigError(
                    f"layer {layer} has {name} of {shape[0]} heads of {shape[1]} elements, and"
                    f" not {self._kv_shape[0]} of {self._kv_shape[1]}: not supported"
                )
        return super().attend(layer, query, key, value, scale)

    def check(self, module: torch.nn.Module, kwargs: Mapping[str, object]) -> None:
        """Raises `ConfigError` if the layer attends in a way of its own."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ConfigError(f"{type(module).__name__} has no layer_idx: not supported")
        self.layers.append(layer)
        for name, value in kwargs.items():
            if not self._harmless(name, value):
                kind = type(module).__name__
                raise ConfigError(f"{kind} attends with {name}={_short(value)}: not supported")
        if getattr(module, "is_causal", True) is False and kwargs.get("is_causal") is not True:
            raise ConfigError(f"{type(module).__name__} does not attend causally: not supported")

    def _harmless(self, name: str, value: object) -> bool:
        if value is None or value is False or name in _HARMLESS:
            return True
        if name == "dropout":
            return value == 0
        if name == "sliding_window" and isinstance(value, int):
            return value >= self._max_context_length
        return name == "is_causal"


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value)[:60]


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    djinn: LayerAttention | None = None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    if djinn is None or attention_mask is not None:
        name = type(module).__name__
        raise ConfigError(f"{name} keeps keyword arguments from its attention: not supported")
    if isinstance(djinn, CheckedAttention):
        djinn.check(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]  # modules' attributes are untyped
    return djinn.attend(layer, query, key, value, scale), None


def register_attention() -> None:
    """Makes ``attn_implementation="djinn"`` known to transformers; harmless when repeated."""
    # What is compiled stops before the attention, which plans and launches in its own ways.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(_attention_forward))


class AnyModel:
    """A `StepModel` over transformers' modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes a model that was loaded with ``attn_implementation=ATTENTION_NAME``."""
        self._model = model
        self._few_rows = FewRows(model)
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def compile_layers(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Has the parts of each layer between products compiled, on their first use.

        All layers share what is compiled, once for one token and once for any other number of
        them; the attention stays as it is.

        Args:
            backend: Of `torch.compile`.
        """
        for layer in self._layers():
            layer.compile(backend=backend, dynamic=True)

    def only_launches(self, forward: Callable[[], object]) -> bool:
        """Returns True if the modules wait for the GPU nowhere, so that a graph can hold them.

        Layers that do not compile are left as they are.

        Args:
            forward: Computes some tokens; called twice, as what is compiled may wait at first.
        """
        try:
            forward()
        except TorchDynamoException as error:
            _log.warning("the layers are not compiled: %s", str(error).partition("\n")[0])
            for layer in self._layers():
                # There is no public way back.
                layer._compiled_call_impl = None
            forward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        try:
            forward()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def _layers(self) -> list[torch.nn.Module]:
        kinds = getattr(self._model, "_no_split_modules", None) or ()
        return [module for module in self._model.modules() if type(module).__name__ in kinds]

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: AttentionBackend,
        plan: Plan,
    ) -> torch.Tensor:
        """See `StepModel.forward`."""
        return self._forward(token_ids, positions, rows, LayerAttention(attention, plan))

    def forward_checked(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: CheckedAttention,
    ) -> torch.Tensor:
        """Does what `forward` does and refuses a model that attends in ways of its own.

        Raises:
            ConfigError: A layer asks for what no backend here does.
        """
        try:
            with torch.compiler.set_stance("force_eager"):
                return self._forward(token_ids, positions, rows, attention)
        except TypeError as error:
            raise ConfigError(f"{error}: not supported") from error

    def reference(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Computes one sequence from its start by transformers' own attention.

        Args:
            token_ids: int64 ``[T]``.

        Returns:
            Logits ``[vocab_size]`` after the last token.
        """
        self._model.set_attn_implementation("sdpa")
        try:
            with torch.compiler.set_stance("force_eager"):
                output = self._model(input_ids=token_ids.unsqueeze(0), use_cache=False)
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: LayerAttention,
    ) -> torch.Tensor:
        keep = {"logits_to_keep": rows} if self._keeps_rows else {}
        with self._few_rows.switched_on():
            output = self._model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                djinn=attention,
                **keep,
            )
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_rows else logits[rows]
