"""What the PERFT layers of one model share, and the hooks on the model that fill it. Nothing here is a parameter."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import delete_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_moe_ext.host.families import loss_counts_items, loss_shifts_labels
from hf_moe_ext.perft.batch import (
    LossShare,
    is_packed,
    read_rows,
    read_sequences,
    share_of_log_probs,
    share_of_loss,
    tokens_per_row,
)
from hf_moe_ext.perft.gradient_sync import is_distributed, share_gradient
from hf_moe_ext.perft.step_load import StepWatch, add_load
from hf_moe_ext.perft.tape import ForwardTape, RouterCoefficients, RouterRecord, anchor_loss


class PerftState:
    """Shared by the layers of one model.

    Attributes:
        tape: the forward pass under way; None outside of one, or when nothing needs it.
        backward_tape: the pass whose backward is under way.
        row_adapters: adapter names of a mixed batch, set for the duration of a call.
        recorders: called with each finished tape.
        records: path of an experts module -> what its layer's routers did.
        coefficients: adapter -> weights of its routers' auxiliary losses.
        fresh: adapters made from a file's configuration and not used yet; a load that fails takes them off again.
        site_names: path of every wrapped module.
        rows_per_name: rows of the batch that share one name of ``row_adapters`` (beams).
        is_distributed: Transformers has spread the model over several processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tape: ForwardTape | None = None
        self.backward_tape: ForwardTape | None = None
        self.row_adapters: list[str] | None = None
        self.rows_per_name = 1
        self.recorders: list[Callable[[ForwardTape], None]] = []
        self.records: dict[str, RouterRecord] = {}
        self.coefficients: dict[str, RouterCoefficients] = {}
        self._step_watch: StepWatch | None = None
        self.fresh: set[str] = set()
        # Weak: the model's hooks hold this object, and a strong reference back would outlive `del model`.
        self._model = weakref.ref(model)
        self.site_names: list[str] = []
        self.is_distributed = is_distributed(model)
        self._argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._shifts_labels, self._counts_items = loss_shifts_labels(model), loss_counts_items(model)
        # Hooks on the model itself, not on PeftModel: model.add_adapter has no PeftModel around it.
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True),
            model.register_forward_hook(self._clear, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model must point to its own model.
        return vars(self) | {"_model": self._model(), "_step_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_model": weakref.ref(state["_model"])})
        self._watch_steps()

    def record_of(self, site_name: str) -> RouterRecord:
        """The record of one layer's routers, into which that layer writes."""
        return self.records.setdefault(site_name, RouterRecord())

    def set_coefficients(self, adapter: str, coefficients: RouterCoefficients) -> None:
        """What the routers of an adapter are held to."""
        self.coefficients[adapter] = coefficients
        self._watch_steps()

    def shared(self, parameter: Tensor) -> Tensor:
        """The parameter as a layer uses it; where Transformers has distributed the model, all ranks share its gradient."""
        return share_gradient(parameter) if self.is_distributed else parameter

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all adapters."""
        model = self._model()
        named = [] if model is None else model.named_parameters()
        return [p for name, p in named if ".perft_" in name and p.requires_grad]

    def _watch_steps(self) -> None:
        if self._step_watch is None and any(c.scope == "global" for c in self.coefficients.values()):
            self._step_watch = StepWatch(self)

    def current_tape(self) -> ForwardTape | None:
        """The pass a layer's forward belongs to: the one under way, or the one being recomputed in backward."""
        if self.tape is not None or torch.compiler.is_compiling():
            return self.tape
        if torch._C._current_graph_task_id() == -1:  # as torch.utils.checkpoint asks: are we inside a backward?
            return None
        # A recomputation must build the same nodes as the first forward, also when no loss has passed by.
        return self.backward_tape or ForwardTape(training=True)

    def begin_backward(self, tape: ForwardTape) -> None:
        """From here to the end of this backward, a block that gradient checkpointing recomputes belongs to ``tape``."""
        self.backward_tape = tape
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.backward_tape = None

    def _clear(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Also after a forward that raised: what it left behind must not reach the next one."""
        self.tape = None
        for record in self.records.values():
            record.sums.clear()
            record.drift.clear()

    def remove_hooks(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        if self._step_watch is not None:
            self._step_watch.remove()
        self._handles, self._step_watch = [], None

    def detach(self, adapter: str) -> None:
        """Undo a half-made attachment: the adapter goes, and with the last one every wrapper and trace of it."""
        model: Any = self._model()
        delete_adapter(model, adapter, prefix="perft_")
        self.coefficients.pop(adapter, None)  # also where no layer had been made yet
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
        rows = read_rows(inputs)
        if rows is None:
            return
        self.tape = ForwardTape(
            sequences=read_sequences(inputs, rows),
            num_tokens=rows.shape[0] * tokens_per_row(rows),
            row_adapters=self._expand_rows(rows.shape[0], inputs),
            training=training,
        )

    def _finish(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        tape, self.tape = self.tape, None
        if tape is None:
            return None
        self._collect(tape)
        if not (tape.sums or tape.drift):
            return None
        for recorder in self.recorders:
            recorder(tape)
        if not tape.training:
            return None
        return _anchor_outputs(outputs, self._named(args, kwargs), self, tape)

    def _collect(self, tape: ForwardTape) -> None:
        """Move what the layers have written to the tape, and count it towards the step where that is asked for."""
        for layer, record in self.records.items():
            for adapter, drift in record.drift.items():
                tape.drift[adapter, layer] = drift
                tape.coefficients[adapter] = self.coefficients[adapter]
            for adapter, sums in record.sums.items():
                coefficients = self.coefficients[adapter]
                tape.sums[adapter, layer] = sums
                tape.coefficients[adapter] = coefficients
                if coefficients.scope == "global" and tape.training:
                    add_load(record, adapter, sums)
                    if adapter in record.last_load:
                        tape.last_load[adapter, layer] = record.last_load[adapter]

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._argument_names, args, strict=False)), **kwargs}

    def _expand_rows(self, batch_size: int, inputs: dict[str, Any]) -> list[str] | None:
        names = self.row_adapters
        if names is None:
            return None
        if is_packed(inputs):
            raise ValueError(
                "adapter_names needs one sequence per row; this batch is padding-free (packed). Pad it, one row each"
            )
        if batch_size == len(names) * self.rows_per_name:
            return [name for name in names for _ in range(self.rows_per_name)]
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {batch_size} "
            "respectively; give one name per row ('__base__' for none)"
        )

    def share_of_loss(self, inputs: dict[str, Any], tape: ForwardTape) -> LossShare:
        """With which weight each sequence of the pass enters the model's own loss."""
        rows = read_rows(inputs)
        assert rows is not None  # the tape was made from them
        if not self._counts_items:
            inputs = inputs | {"num_items_in_batch": None}
        return share_of_loss(inputs, tape.sequences, rows.shape[0], self._shifts_labels)


def _anchor_outputs(outputs: Any, inputs: dict[str, Any], state: PerftState, tape: ForwardTape) -> Any:
    """Attach the tape to whatever the trainer will differentiate: the loss, or TRL's log-probabilities."""
    if isinstance(outputs, tuple):
        if outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0:
            return (_anchor(outputs[0], state.share_of_loss(inputs, tape), state, tape, "loss"), *outputs[1:])
        return None
    loss, log_probs = getattr(outputs, "loss", None), getattr(outputs, "log_probs", None)
    if isinstance(loss, Tensor):
        outputs.loss = _anchor(loss, state.share_of_loss(inputs, tape), state, tape, "loss")
    if isinstance(log_probs, Tensor):
        share = share_of_log_probs(log_probs, getattr(outputs, "label_mask", None), tape.sequences)
        outputs.log_probs = _anchor(log_probs, share, state, tape, "log_probs")
    return outputs


def _anchor(value: Tensor, share: LossShare, state: PerftState, tape: ForwardTape, source: str) -> Tensor:
    """``value`` unchanged, with the auxiliary gradient behind it; ``share`` turns its gradient into the tape's weights."""
    if not value.requires_grad:
        return value
    compiled, eager = tape.by_mechanism()
    if compiled:
        value = share.attach(value, tape.objective().to(value.device))
    if eager:
        # A node in Python ends a compiled graph. Eager layers under a compiled model mean that it ended before.
        attach = torch.compiler.disable(anchor_loss) if torch.compiler.is_compiling() else anchor_loss
        value = attach(value, share, state, tape, source)
    return value


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
