"""What the PERFT layers of one model share, and the hooks on the model that fill it. Nothing here is a parameter."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import delete_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_moe_ext.host.families import loss_shifts_labels
from hf_moe_ext.perft.tape import ForwardTape, anchor_loss

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class PerftState:
    """Shared by the layers of one model.

    Attributes:
        tape: the forward pass under way; None outside of one, or when nothing needs it.
        backward_tape: the pass whose backward is under way.
        row_adapters: adapter names of a mixed batch, set for the duration of a call.
        recorders: called with each finished tape.
        fresh: adapters made from a file's configuration and not used yet; a load that fails takes them off again.
        site_names: path of every wrapped experts module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tape: ForwardTape | None = None
        self.backward_tape: ForwardTape | None = None
        self.row_adapters: list[str] | None = None
        self.rows_per_name = 1
        self.recorders: list[Callable[[ForwardTape], None]] = []
        self.fresh: set[str] = set()
        # Weak: the model's hooks hold this object, and a strong reference back would outlive `del model`.
        self._model = weakref.ref(model)
        self.site_names: list[str] = []
        self._argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._shifts_labels = loss_shifts_labels(model)
        # Hooks on the model itself, not on PeftModel: model.add_adapter has no PeftModel around it.
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True),
            model.register_forward_hook(self._clear, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model must point to its own model.
        return vars(self) | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_model": weakref.ref(state["_model"])})

    def current_tape(self) -> ForwardTape | None:
        """The pass a layer's forward belongs to: the one under way, or the one being recomputed in backward."""
        if self.tape is not None or torch.compiler.is_compiling():
            return self.tape
        if torch._C._current_graph_task_id() == -1:  # as torch.utils.checkpoint asks: are we inside a backward?
            return None
        # A recomputation must build the same nodes as the first forward, also when no loss has passed by.
        return self.backward_tape or ForwardTape(num_tokens=0, training=True)

    def begin_backward(self, tape: ForwardTape) -> None:
        """From here to the end of this backward, a block that gradient checkpointing recomputes belongs to ``tape``."""
        self.backward_tape = tape
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.backward_tape = None

    def _clear(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Also after a forward that raised: what it left behind must not reach the next one."""
        self.tape = None

    def remove_hooks(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self, adapter: str) -> None:
        """Undo a half-made attachment: the adapter goes, and with the last one every wrapper and trace of it."""
        model: Any = self._model()
        delete_adapter(model, adapter, prefix="perft_")
        getattr(model, "peft_config", {}).pop(adapter, None)
        if getattr(model, "peft_config", None):
            return
        for name in self.site_names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_submodule(f"{name}.base_layer"))
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, attribute = name.rpartition(".")
                base = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(model.get_submodule(parent), attribute, base)
        self.remove_hooks()
        vars(model).pop("peft_config", None)
        vars(model).pop("_hf_peft_config_loaded", None)  # Transformers' own note that an adapter is there

    def refuse_load(self, adapter: str, message: str) -> NoReturn:
        """Raise; an adapter that this load had made is taken off, one that was there before stays as it was."""
        if adapter in self.fresh:
            self.detach(adapter)
        raise ValueError(message)

    def refuse_partial_load(self, adapter: str, or_empty: bool = False) -> None:
        """Raise if Transformers' loader, which only prints a table, has filled only some of an adapter's tensors.

        Extra tensors of a file it only lists; nothing of them arrives here.

        Args:
            adapter: its name.
            or_empty: also if it filled none.
        """
        suffix, model = f".{adapter}", self._model()
        assert model is not None
        tensors = {n: p for n, p in model.named_parameters() if ".perft_" in n and n.endswith(suffix)}
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing and (or_empty or len(missing) < len(tensors)):
            self.refuse_load(adapter, describe_key_mismatch(missing, []))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tape = None
        for adapter in list(self.fresh):
            self.refuse_partial_load(adapter)
        self.fresh.clear()
        if "adapter_names" in kwargs:
            raise ValueError(
                "adapter_names needs the PeftModel around the model (peft.get_peft_model or PeftModel.from_pretrained); "
                "called on the bare model it would be ignored"
            )
        training = model.training and torch.is_grad_enabled()
        if not (training or self.row_adapters or self.recorders):
            return
        inputs = self._named(args, kwargs)
        rows = inputs.get("input_ids")
        if rows is None:
            rows = inputs.get("inputs_embeds")
        if rows is None:  # a model of another kind: its first tensor carries the batch
            rows = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
        if rows is None:
            return
        self.tape = ForwardTape(
            num_tokens=rows.shape[0] * (rows.shape[1] if rows.ndim > 1 else 1),
            mask=_token_mask(inputs.get("attention_mask"), rows.shape[1]) if rows.ndim > 1 else None,
            row_adapters=self._expand_rows(rows.shape[0], inputs),
            training=training,
        )

    def _finish(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        tape, self.tape = self.tape, None
        if tape is None or not tape.sums:
            return None
        for recorder in self.recorders:
            recorder(tape)
        if not tape.training:
            return None
        return _anchor_outputs(outputs, self._loss_share(self._named(args, kwargs)), self, tape)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._argument_names, args, strict=False)), **kwargs}

    def _expand_rows(self, batch_size: int, inputs: dict[str, Any]) -> list[str] | None:
        names = self.row_adapters
        if names is None:
            return None
        if any(inputs.get(key) is not None for key in _PACKED) or _restarts(
            inputs.get("position_ids"), inputs.get("attention_mask")
        ):
            raise ValueError(
                "adapter_names needs one sequence per row; this batch is padding-free (packed). Pad it, one row each"
            )
        if batch_size == len(names) * self.rows_per_name:
            return [name for name in names for _ in range(self.rows_per_name)]
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {batch_size} "
            "respectively; give one name per row ('__base__' for none)"
        )

    def _loss_share(self, inputs: dict[str, Any]) -> Tensor | float:
        """This micro-batch's share of the loss tokens of the step, where the trainer has said how many those are."""
        step_tokens, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
        if step_tokens is None or labels is None:
            return 1.0
        if inputs.get("shift_labels") is not None:
            labels = inputs["shift_labels"]
        elif self._shifts_labels:
            labels = labels[..., 1:]
        # In float64, so that a float64 model is not held back by it; MPS has none.
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        return labels.ne(-100).sum().to(dtype) / step_tokens


def _anchor_outputs(outputs: Any, share: Tensor | float, state: PerftState, tape: ForwardTape) -> Any:
    """Attach the tape to whatever the trainer will differentiate: the loss, or TRL's log-probabilities."""
    if isinstance(outputs, tuple):
        if outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0:
            return (_anchor(outputs[0], share, state, tape, "loss"), *outputs[1:])
        return None
    loss, log_probs = getattr(outputs, "loss", None), getattr(outputs, "log_probs", None)
    if isinstance(loss, Tensor):
        outputs.loss = _anchor(loss, share, state, tape, "loss")
    if isinstance(log_probs, Tensor):
        # The trainer sums -log_probs over loss tokens, each with its weight: minus their summed gradient is the
        # micro-batch's weight. Positions outside the loss are zeros there, yet receive a gradient.
        counted = getattr(outputs, "label_mask", None)
        counted = torch.ones_like(log_probs) if counted is None else counted.to(log_probs.dtype)
        outputs.log_probs = _anchor(log_probs, -counted, state, tape, "log_probs")
    return outputs


def _anchor(value: Tensor, share: Tensor | float, state: PerftState, tape: ForwardTape, source: str) -> Tensor:
    """``value`` unchanged, with the auxiliary gradient behind it; ``share`` turns its gradient into the tape's weight."""
    if not value.requires_grad:
        return value
    share = torch.as_tensor(share, device=value.device)
    compiled, eager = tape.by_mechanism()
    if compiled:
        objective = tape.objective().to(value.device)
        value = value + (share * (objective - objective.detach())).to(value.dtype)
    if eager:
        # A node in Python ends a compiled graph. Eager layers under a compiled model mean that it ended before.
        attach = torch.compiler.disable(anchor_loss) if torch.compiler.is_compiling() else anchor_loss
        value = attach(value, share, state, tape, source)
    return value


def _token_mask(attention_mask: Any, tokens: int) -> Tensor | None:
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:].bool().reshape(-1)


def _restarts(position_ids: Any, attention_mask: Any) -> bool:
    """Whether a row holds several sequences: a real token at position 0 after another 0 and something else."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return False  # one token, as in decoding, needs no look at its value, which would wait for the device
    starts = position_ids == 0
    if isinstance(attention_mask, Tensor) and attention_mask.shape == position_ids.shape:
        starts = starts & attention_mask.bool()
    started = starts.cumsum(dim=1) > 0
    again = starts[:, 1:] & started[:, :-1] & ~starts[:, :-1]
    return bool(again.any())


def describe_key_mismatch(missing: list[str], extra: list[str]) -> str:
    """The message for an adapter file whose tensors are not those of the model."""
    parts = [
        f"{label} {len(keys)} tensors ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for label, keys in (("lacks", missing), ("has", extra))
        if keys
    ]
    reason = " and ".join(parts)
    return (
        f"adapter file does not fit this model and configuration: it {reason}"
        f"{' that do not belong here' if extra else ''}; load it on the base model it was trained for, with the "
        "adapter_config.json it was saved with"
    )
