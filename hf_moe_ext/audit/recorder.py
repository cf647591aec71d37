"""``RoutingRecorder``: what every router of a model does, over a block of code or a training, in sums on the device."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_moe_ext.audit.batch import BatchFacts, SliceNames
from hf_moe_ext.audit.events import BASE, RoutingEvent, seam_of, unwrap, watch_routing
from hf_moe_ext.audit.reading import RoutingReading
from hf_moe_ext.audit.slices import SliceCollator, number_slices
from hf_moe_ext.audit.tally import RouterTally, Tallies, counts_here, sum_tallies
from hf_moe_ext.audit.thresholds import RoutingThresholds, RoutingWarning, judge

_DEFAULT = RoutingThresholds()
_ONLY_INVALID = RoutingThresholds(
    dead_fraction=None, load_ratio=None, variation=None, load_entropy=None, max_probability=None
)


class RoutingRecorder(TrainerCallback):
    """Records base and adapter routers; a context manager, and a callback of the Trainer.

    As a callback it adds ``RoutingReading.summary`` of the steps since the last log to each log line with a loss. Reporters
    are told of a log in the order of ``trainer.callback_handler.callbacks``, and the Trainer puts its own first:
    ``attach_to`` puts the recorder before them, so that every tracker shows the keys.

    Args:
        model: any model with experts that Transformers serves, wrapped or not.
        thresholds: what to warn of, and from when on; None: of nothing but values that are not finite.
        coactivation: also count which experts are chosen together.
        slice_column: column of the data set with the name of an example's slice; see ``collator`` and ``attach_to``.
            (In a loop of one's own, ``tag_batch`` names the rows instead.)
        slices: all names in that column.
        training_only: record passes in training mode only; None: as a callback yes, as a context manager no.

    Raises:
        ValueError: the model has no MoE block; slice_column without slices.

    Example:
        ``with RoutingRecorder(model) as recorder: model.generate(**inputs)`` and then ``recorder.reading()``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        thresholds: RoutingThresholds | None = _DEFAULT,
        coactivation: bool = False,
        slice_column: str | None = None,
        slices: Sequence[str] = (),
        training_only: bool | None = None,
    ) -> None:
        self._slices = number_slices(slice_column, slices)
        self._given_slices = tuple(self._slices)
        self._seam = seam_of(model)
        self._model = unwrap(model)
        self.thresholds, self.coactivation = thresholds, coactivation
        self.slice_column, self.training_only = slice_column, training_only
        self._order = list(self._seam.experts)
        self._interval: Tallies = {}
        self._before: Tallies = {}
        self._stack: ExitStack | None = None
        self._training_now = False
        self._warned: set[tuple[str, str]] = set()
        self._token_slices: tuple[BatchFacts, Tensor | None] | None = None

    def __enter__(self) -> Self:
        self._start(training_only=bool(self.training_only))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if kind is None:
            self.warn(self.reading(reduce=False))  # of this process: the others may not get here

    def _start(self, training_only: bool) -> None:
        if self._stack is not None:
            raise RuntimeError("this RoutingRecorder is recording already; leave it first, or make a second one")
        self._training_now = training_only
        self._stack = ExitStack()
        self._stack.enter_context(watch_routing(self._model, self._add, self._given_slices))

    def _stop(self) -> None:
        stack, self._stack, self._token_slices = self._stack, None, None
        if stack is not None:
            stack.close()

    def _add(self, event: RoutingEvent) -> None:
        # The mode, not whether gradients are on: reentrant checkpointing runs its first pass without.
        if self._training_now and not self._model.training:
            return
        key = (event.layer, event.router)
        slices = self._number_tokens(event.batch)
        if key not in self._interval:
            self._interval[key] = RouterTally.empty(
                event.num_experts, event.index.shape[1], event.index.device, self.coactivation
            )
        tally = self._interval[key]
        tally.grow(len(self._slices))
        tally.add(event.index, event.weights, event.probabilities, event.batch.mask, slices)

    def _number_tokens(self, facts: BatchFacts) -> Tensor | None:
        """[tokens] number of each token's slice; the layers of a pass share it."""
        if facts.slices is None:
            return None
        if self._token_slices is None or self._token_slices[0] is not facts:
            names, device = facts.slices, facts.rows.device
            known = names.names if isinstance(names, SliceNames) else dict.fromkeys(names)
            for name in known:
                self._slices.setdefault(name, len(self._slices))
            if isinstance(names, SliceNames):
                numbers = torch.tensor([self._slices[name] for name in names.names], device=device)[names.ids]
            else:
                numbers = torch.tensor([self._slices[name] for name in names], device=device)
            self._token_slices = (facts, numbers[facts.rows])
        return self._token_slices[1]

    def reading(self, reduce: bool = True) -> RoutingReading:
        """Everything seen since the start or the last ``reset``.

        Args:
            reduce: sum over all processes, each of which must call it then; False: of this process alone.
        """
        return self._read(_together(self._before, self._interval), reduce)

    def reset(self) -> None:
        """Start again from nothing."""
        self._interval, self._before = {}, {}
        self._warned.clear()

    def _read(self, tallies: Tallies, reduce: bool = True) -> RoutingReading:
        slices = self._slices
        if reduce:
            tallies, slices = sum_tallies(tallies, slices, counts_here(self._model))
        for tally in tallies.values():
            tally.grow(len(slices))

        def place(key: tuple[str, str]) -> Any:
            layer, router = key
            return (self._order.index(layer), router != BASE, router)

        return RoutingReading(tuple(tallies[key].read(*key, slices) for key in sorted(tallies, key=place)))

    def collator(
        self, collator: Callable[..., Any], columns: Sequence[str] | None = None, example_column: str | None = None
    ) -> SliceCollator:
        """The collator to give the Trainer in place of ``collator``, so that the recorder learns each row's slice.

        The Trainer takes the slice's column out of the data unless ``TrainingArguments(remove_unused_columns=False)``;
        ``columns`` does then what it did: an example keeps those only. A hook that takes the numbers out of the batch
        before the model sees them stays on the model, for passes that nobody records.
        """
        self._seam.keep_out_tags()
        return SliceCollator(collator, self.slice_column, self._given_slices, example_column, columns)

    def attach_to(self, trainer: Any) -> Self:
        """Join a Trainer: before its reporters, and with the data's slices where ``slice_column`` is given."""
        handler = trainer.callback_handler
        if self in handler.callbacks:
            handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)
        if self.slice_column is not None and not isinstance(trainer.data_collator, SliceCollator):
            columns = None
            if trainer.args.remove_unused_columns:
                trainer._set_signature_columns_if_needed()
                columns = trainer._signature_columns
                trainer.args.remove_unused_columns = False
            trainer.data_collator = self.collator(trainer.data_collator, columns)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording."""
        self._stop()  # what an error ended in an earlier run
        self._start(training_only=self.training_only is not False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording; ``reading`` has the whole run."""
        self._stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the keys to this log line, warn of what is past a limit, and start the next interval."""
        if logs is None or "loss" not in logs:
            return
        reading = self._read(self._interval)
        self._before, self._interval = _together(self._before, self._interval), {}
        values = reading.summary()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        if state.is_world_process_zero:
            self.warn(reading)

    def warn(self, reading: RoutingReading) -> None:
        """Warn of what is past a limit, once for each kind of router and measure."""
        findings = judge(reading, self.thresholds or _ONLY_INVALID)
        for kind, measure in dict.fromkeys((f.router, f.measure) for f in findings):
            if (kind, measure) in self._warned:
                continue
            self._warned.add((kind, measure))
            same = [f for f in findings if (f.router, f.measure) == (kind, measure)]
            others = f" (and {len(same) - 1} more layers)" if len(same) > 1 else ""
            warnings.warn(f"routing audit: {same[0]}{others}; {same[0].advice}", RoutingWarning, stacklevel=2)


def _together(first: Tallies, second: Tallies) -> Tallies:
    """The sums of both; neither is changed."""
    result: Tallies = {}
    for tallies in (first, second):
        for key, tally in tallies.items():
            if key not in result:
                result[key] = RouterTally.empty(
                    tally.num_experts, tally.top_k, tally.counts.device, tally.coactivation is not None
                )
            result[key].include(tally)
    return result
