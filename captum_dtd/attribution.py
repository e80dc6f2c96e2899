"""`DeepTaylor`: deep Taylor decomposition as a Captum attribution method."""

from __future__ import annotations

import inspect
import numbers
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary, WeakMethod

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from captum_dtd import native
from captum_dtd.advice import check_order, check_winners
from captum_dtd.bounds import Bound, broadcast_bound, lies_within, without_repeats
from captum_dtd.collapse import FrozenNetwork, Wanted
from captum_dtd.composites import Composite, Selector, as_composite
from captum_dtd.graph import InputMismatchError, check_not_tracing, trace
from captum_dtd.inputs import (
    Target,
    as_arguments,
    check_batch_size,
    check_evaluation_mode,
    check_option,
    check_targets,
    checked_inputs,
    layout_hint,
    signature_of,
    take,
    take_arguments,
    take_target,
    target_mask,
)
from captum_dtd.kernels import Precision
from captum_dtd.locks import Lock
from captum_dtd.modes import uncompiled
from captum_dtd.nodes import operation_name, source_line
from captum_dtd.propagate import Activations, Network, Observer, Step, Values
from captum_dtd.replay import Choose, Replay
from captum_dtd.rules import MaxPoolRule, Rule
from captum_dtd.structure import hooked_modules, structure_of, unwrap
from captum_dtd.tables import Ledger, LedgerRow, RuleRow, RuleTable

Seed: TypeAlias = Literal["logit", "one"]
Backend: TypeAlias = Literal["auto", "reference"]
CompositeLike: TypeAlias = str | Composite | Mapping[Selector, Rule | MaxPoolRule]

Backward: TypeAlias = Callable[
    [Activations, Sequence[Tensor], Sequence[tuple[Tensor, Tensor]]], list[tuple[Tensor, ...]]
]
"""The walk from seeds back to the explained inputs, of `Network` or `FrozenNetwork`."""

# More traces than this are kept by nobody's use; a graph holds no weights, so each is small.
_MOST_TRACES = 32


class DeepTaylor(Attribution):  # type: ignore[misc]
    """Deep Taylor decomposition of a network's decision (Montavon et al. 2017), on the user's model as it is.

    Relevance starts at the target's score and walks back layer by layer, z+ in hidden layers and z-beta at the pixels (or
    by another composite), so that every pixel gets its share of the score and the shares add up to it. The model is traced
    on the first call (seconds), never changed, and its weights are read anew by every call.

    Args:
        model: a module in evaluation mode that returns one tensor of scores, (N,), (N, classes) or more.
        low: the darkest possible pixel after normalisation: a number, one per channel, or a tensor that broadcasts against
            the input; for a tuple of inputs a tuple of these. See `captum_dtd.pixel_bounds`.
        high: the brightest possible pixel, likewise.
        composite: which rule is used where: ``"dtd"``, ``"epsilon-gamma-box"``, a `captum_dtd.Composite`, or a mapping from
            globs of module paths or module types to rules, laid over ``"dtd"``.
        seed: ``"logit"``: relevance starts as the target's score; ``"one"``: as 1.
        backend: ``"auto"``: the fastest kernels at hand; ``"reference"``: plain ATen in IEEE arithmetic. The rule table
            names the kernel that serves each layer.
        precision: how much the kernels may round: ``"float32"``: within 1e-4 of the input's own precision; ``"ieee"``: no more
            than that precision itself; ``"mixed"``: bfloat16 products on the walk back, with relevance in two halves;
            ``"bfloat16"``: bfloat16 products. Sums and relevance are float32, or float64 for a float64 model.
        cuda_graphs: whether explanations on a GPU are recorded when inputs of a shape come the second time, and replayed from
            then on: the same relevance, without what Python needs to ask for each of hundreds of operations. Recordings keep
            the memory that they work in. On a CPU there is nothing to record.

    Raises:
        TypeError: if the model is not a module, the composite is not one, or ``cuda_graphs`` is not a bool.
        ValueError: if an option does not exist.

    Example:
        >>> import torch
        >>> from captum_dtd import DeepTaylor, pixel_bounds
        >>> from captum_dtd.models import c3d_mini
        >>> model = c3d_mini(num_classes=10).eval()
        >>> low, high = pixel_bounds(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> clips = torch.rand(2, 3, 8, 32, 32) * 4 - 2
        >>> relevance = DeepTaylor(model, low, high).attribute(clips, target=3)
        >>> relevance.shape
        torch.Size([2, 3, 8, 32, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        low: Bound | tuple[Bound, ...],
        high: Bound | tuple[Bound, ...],
        *,
        composite: CompositeLike = "dtd",
        seed: Seed = "logit",
        backend: Backend = "auto",
        precision: Precision = "float32",
        cuda_graphs: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; wrap a function in a module")
        check_option("seed", seed, get_args(Seed))
        check_option("backend", backend, get_args(Backend))
        check_option("precision", precision, get_args(Precision))
        if not isinstance(cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be True or False, got {cuda_graphs!r}")
        if backend == "reference" and precision in ("mixed", "bfloat16"):
            raise ValueError(f"backend='reference' is IEEE arithmetic: precision={precision!r} needs backend='auto'")
        super().__init__(model)
        self.model = model
        self.low = low
        self.high = high
        self.composite = as_composite(composite)
        self.seed = seed
        self.backend = backend
        self.precision = precision
        self.cuda_graphs = cuda_graphs
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._lock = Lock()
        self._networks: OrderedDict[object, Network] = OrderedDict()
        self._frozen: OrderedDict[Network, FrozenNetwork] = OrderedDict()
        self._notes: WeakKeyDictionary[Network, list[str]] = WeakKeyDictionary()
        told = WeakMethod(self._warn_about)  # a method that is let go goes at once, with its model

        def warn(finding: str) -> None:
            if (warn_about := told()) is not None:
                warn_about([finding])

        self._replay = Replay(warn)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but traces and recordings, which are made again where they are needed."""
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_lock", "_networks", "_frozen", "_notes", "_replay")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @uncompiled
    @log_usage()  # type: ignore[untyped-decorator]
    @torch.inference_mode(False)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        *,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Relevance of every input element for the target's score.

        Args:
            inputs: a floating-point tensor (N, C, T, H, W) of clips or (N, C, H, W) of images, as the model takes it, or a
                tuple of such tensors with the same N.
            target: which output is explained: an index for all examples, a list or tensor with one per example, a tuple of
                indices where the output has more than two dimensions, a list of such tuples; None only where the model
                returns one value per example.
            additional_forward_args: further arguments of the model's forward, not explained; tensors with N rows are
                batched along.
            return_convergence_delta: also return what was lost on the way, one value per example.
            internal_batch_size: how many examples are explained at once; by default as many as free memory allows.
            show_progress: show a progress bar.

        Returns:
            A tensor shaped like ``inputs`` (a tuple for a tuple), float32, or float64 for float64 inputs, in the units of the
            score: for the composite ``"dtd"`` it sums to the seed, up to the convergence delta, and has its sign everywhere
            (where several logits are averaged, the sign of each). With ``return_convergence_delta`` a pair of that and the delta
            (N,), ``seed - sum of relevance``.

        Raises:
            TypeError: if ``inputs`` are not tensors.
            ValueError: if the model is in training mode, the inputs are not finite, of another shape or type than the model
                takes, or the target does not exist.
            UnsupportedOperationError: if relevance would have to cross an operation that no rule covers.
        """
        (result,) = self.attribute_targets(
            inputs,
            [target],
            additional_forward_args,
            return_convergence_delta,
            internal_batch_size=internal_batch_size,
            show_progress=show_progress,
        )
        return result

    @uncompiled
    @torch.inference_mode(False)
    def attribute_targets(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target],
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        *,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[Any]:
        """What `attribute` returns for each of several targets of the same inputs, for less than their sum in time.

        The targets share the forward pass and every denominator; what each has of its own is the walk back.

        Args:
            inputs: as for `attribute`.
            targets: several, each in a form that `attribute` takes.
            additional_forward_args: as for `attribute`, and so are the further options.

        Returns:
            One result of `attribute` for each target.

        Raises:
            TypeError, ValueError, UnsupportedOperationError: as `attribute`, and ValueError if there are no targets.

        Example:
            >>> import torch
            >>> from captum_dtd.models import c3d_mini
            >>> method, clip = DeepTaylor(c3d_mini().eval(), low=0.0, high=1.0), torch.rand(1, 3, 8, 32, 32)
            >>> first, second = method.attribute_targets(clip, [3, 7])
            >>> bool(torch.allclose(second, method.attribute(clip, 7), atol=1e-6))
            True
        """
        explained = self._explain(inputs, targets, additional_forward_args, internal_batch_size, show_progress)
        results = [(relevance if isinstance(inputs, tuple) else relevance[0], delta) for relevance, delta in explained]
        return list(results) if return_convergence_delta else [result for result, _ in results]

    @uncompiled
    @torch.inference_mode(False)
    def logits(self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any = None) -> Tensor | None:
        """The scores that are explained where they are not what the model returns, since it ends in a softmax or sigmoid.

        Args:
            inputs: as for `attribute`.
            additional_forward_args: as for `attribute`.

        Returns:
            What the softmax or sigmoid is taken of, (N, classes, ...); None where the model's output itself is explained.

        Raises:
            TypeError, ValueError, UnsupportedOperationError: as `attribute`.

        Example:
            >>> import torch
            >>> from captum_dtd.models import c3d_mini
            >>> model, clip = c3d_mini().eval(), torch.rand(1, 3, 8, 32, 32)
            >>> method = DeepTaylor(torch.nn.Sequential(model, torch.nn.Softmax(dim=1)), low=0.0, high=1.0)
            >>> bool(torch.allclose(method.logits(clip), model(clip), atol=1e-4))
            True
        """
        tensors, extra = checked_inputs(inputs), as_arguments(additional_forward_args)
        network = self._network(tensors, extra)
        if not network.ends_in_probabilities:
            return None
        weights = self._weights_of(network)()
        with native.unchanging(weights.values()):
            return network.forward(weights, pytree.tree_leaves((*tensors, *extra))).output.detach()

    @uncompiled
    def rule_table(self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any = None) -> RuleTable:
        """Which rule every operation would follow on such inputs, without explaining anything; print it.

        Args:
            inputs: as for `attribute`; shapes and types matter, values do not.
            additional_forward_args: as for `attribute`.

        Raises:
            ValueError: as `attribute` does for inputs that the model does not take.
        """
        return self._rule_table(
            self._network(checked_inputs(inputs), as_arguments(additional_forward_args)), lambda _: ""
        )

    def frozen_rule_table(self, clips: tuple[Tensor, ...], extra: tuple[Any, ...]) -> RuleTable:
        """The rule table, with the times of a frozen clip that every operation computes; arguments as for `frozen_clips`."""
        frozen = self.frozen_clips(clips, extra)
        return self._rule_table(
            self._network(clips, extra), (lambda _: "every time") if frozen is None else frozen.network.summary
        )

    def _rule_table(self, network: Network, times: Callable[[Step], str]) -> RuleTable:
        rows = (
            RuleRow(
                step.node.name,
                operation_name(step.node),
                step.path,
                step.rule_text,
                network.kernel_of(step),
                source_line(step.node),
                times(step),
            )
            for step in network.steps
        )
        return RuleTable(self.composite.name, tuple(rows), network.notes)

    def frozen_clips(self, clips: tuple[Tensor, ...], extra: tuple[Any, ...]) -> FrozenClips | None:
        """What explains frozen clips of this shape at distinct times only, with the weights as they are now.

        Args:
            clips: checked inputs (N, C, T, H, W); shapes and types matter, values do not.
            extra: additional arguments of the model's forward, likewise.

        Returns:
            None where frozen clips can only be explained as any clip: pixel bounds vary over time, or the model's code fixes
            the number of examples.

        Raises:
            ValueError: if the model takes clips in another order, (N, T, C, H, W) say.
        """
        network = self._network(clips, extra)
        if network not in self._notes:
            found = check_order(network, clips[0].shape[1:]), check_winners(network, clips[0].shape[2])
            self._notes[network] = [note for note in found if note is not None]
        self._warn_about(self._notes[network])
        bounds = self.bounds_of(tuple(clip[:1] for clip in clips))
        if not network.any_batch or any(_varies_in_time(end) for pair in bounds for end in pair):
            return None
        with self._lock:
            if network not in self._frozen:
                self._frozen[network] = FrozenNetwork(network, clips[0].shape[2])
            self._frozen.move_to_end(network)
            while len(self._frozen) > _MOST_TRACES:
                self._frozen.popitem(last=False)
            frozen = self._frozen[network]
        of_a_frame = [(low[:, :, :1], high[:, :, :1]) for low, high in bounds]
        return FrozenClips(self, frozen, self._weights_of(network), of_a_frame)

    @uncompiled
    @torch.inference_mode(False)
    def ledger(
        self, inputs: Tensor | tuple[Tensor, ...], target: Target = None, additional_forward_args: Any = None
    ) -> Ledger:
        """Explain the inputs and record, operation by operation, how much relevance arrived and left; print it.

        Args:
            inputs: as for `attribute`.
            target: as for `attribute`.
            additional_forward_args: as for `attribute`.

        Raises:
            ValueError: as `attribute`.
        """
        tensors, extra = checked_inputs(inputs), as_arguments(additional_forward_args)
        count = len(tensors[0])
        first = slice(0, min(1, count))
        network = self._network(take(tensors, first), take_arguments(extra, first, count))
        weights = self._weights_of(network)
        bounds = self.bounds_of(tensors)
        columns: list[list[tuple[Step, Tensor, Tensor]]] = []
        seeds, sums = [], []
        # Example by example: inside a network the batch dimension may be merged with others, so sums per example need this.
        for i in range(count):
            column: list[tuple[Step, Tensor, Tensor]] = []

            def observe(step: Step, arriving: Any, leaving: Sequence[Tensor], column: Any = column) -> None:
                column.append((step, _total(pytree.tree_leaves(arriving)), _total(leaving)))

            example = slice(i, i + 1)
            ((relevance, seed),) = self._walk(network, weights, tensors, extra, [target], bounds, example, observe)
            columns.append(column)
            seeds.append(seed.sum())
            sums.append(_total(relevance))
        rows = tuple(
            LedgerRow(
                same_step[0][0].node.name,
                operation_name(same_step[0][0].node),
                same_step[0][0].path,
                same_step[0][0].rule_text,
                torch.stack([arriving for _, arriving, _ in same_step]),
                torch.stack([leaving for _, _, leaving in same_step]),
            )
            for same_step in zip(*columns, strict=True)
        )
        if not count:
            return Ledger((), bounds[0][0].new_zeros(0), bounds[0][0].new_zeros(0))
        return Ledger(rows, torch.stack(seeds), torch.stack(sums))

    def has_convergence_delta(self) -> bool:
        """True: relevance that was lost on the way can be told."""
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: relevance is a share of the score, not a sensitivity."""
        return True

    def compute_convergence_delta(self, attributions: Tensor | tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What was lost on the way: ``output - sum of attributions``, one value per example (N,).

        Args:
            attributions: what `attribute` returned.
            output: the relevance that the walk started with, (N,): the target's score, or 1 with ``seed="one"``.
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        return output.flatten() - torch.stack([part.sum(tuple(range(1, part.ndim))) for part in parts]).sum(0)

    def affordable_batch(
        self, inputs: tuple[Tensor, ...], additional_forward_args: Any = None, enough: tuple[int, int] | None = None
    ) -> int:
        """How many such examples can be explained at once in half of the memory that is free now; at least 1.

        ``enough``: no more than this number, or than take this many bytes if that is more.
        """
        network = self._network(inputs, as_arguments(additional_forward_args))
        affordable = self._affordable(network, inputs)
        if enough is None:
            return affordable
        count, size = enough
        return min(affordable, max(count, size // max(1, network.bytes_per_example)))

    def fixed_batch(self, inputs: tuple[Tensor, ...], additional_forward_args: Any = None) -> int | None:
        """The number of examples that the model's code insists on; None where it takes any."""
        network = self._network(inputs, as_arguments(additional_forward_args))
        return None if network.any_batch else len(inputs[0])

    def frozen_together(self, inputs: tuple[Tensor, ...], additional_forward_args: Any = None) -> int | None:
        """How many frozen clips the model's code lets be explained at once; None for any number.

        One where it makes values of all examples together; where it takes just so many examples, all frames of these.
        """
        network = self._network(inputs, as_arguments(additional_forward_args))
        if network.mixing:
            return 1
        return None if network.any_batch else len(inputs[0]) * inputs[0].shape[2]

    def _affordable(self, network: Network, inputs: tuple[Tensor, ...]) -> int:
        return max(1, free_memory(inputs[0].device) // 2 // max(1, network.bytes_per_example))

    def _explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target],
        additional_forward_args: Any,
        internal_batch_size: int | None,
        show_progress: bool,
    ) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        tensors, extra = checked_inputs(inputs), as_arguments(additional_forward_args)
        check_batch_size(internal_batch_size)
        check_targets(targets)
        count = len(tensors[0])
        with tqdm(total=count, desc=self.get_name(), unit="clip", disable=not show_progress) as progress:
            progress.set_postfix_str("tracing the model")
            first = slice(0, min(internal_batch_size or count, count))
            network = self._network(take(tensors, first), take_arguments(extra, first, count))
            progress.set_postfix_str("")
            bounds = self.bounds_of(tensors)
            if count == 0:
                nothing = (
                    tuple(
                        torch.zeros_like(tensor, dtype=low.dtype)
                        for tensor, (low, _) in zip(tensors, bounds, strict=True)
                    ),
                    bounds[0][0].new_zeros(0),
                )
                return [nothing for _ in targets]
            self._warn_about(self._findings(network, tensors, bounds))
            weights = self._weights_of(network)
            size = internal_batch_size or (self._affordable(network, tensors) if network.any_batch else count)
            chunks: list[list[tuple[tuple[Tensor, ...], Tensor]]] = []
            for start in range(0, count, size):
                rows = slice(start, min(start + size, count))
                if not network.any_batch:
                    network = self._network(take(tensors, rows), take_arguments(extra, rows, count))
                    weights = self._weights_of(network)
                chunk: list[tuple[tuple[Tensor, ...], Tensor]] = []
                for relevance, seed in self._walk(network, weights, tensors, extra, targets, bounds, rows):
                    sums = seed.reshape(len(seed), -1).sum(1)
                    delta = self.compute_convergence_delta(relevance, sums)
                    is_kept = (delta.abs() <= 0.5 * sums.abs()) & delta.isfinite()
                    if not bool(is_kept.all()):
                        self._warn_about(_not_kept(delta[~is_kept], sums[~is_kept]))
                    chunk.append((relevance, delta))
                chunks.append(chunk)
                progress.update(rows.stop - rows.start)
        results: list[tuple[tuple[Tensor, ...], Tensor]] = []
        for of_target in zip(*chunks, strict=True):
            relevances, deltas = zip(*of_target, strict=True)
            results.append(
                (tuple(_joined(parts).contiguous() for parts in zip(*relevances, strict=True)), torch.cat(deltas))
            )
        return results

    def _walk(
        self,
        network: Network,
        weights: Callable[[], Values],
        inputs: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        targets: Sequence[Target],
        bounds: list[tuple[Tensor, Tensor]],
        rows: slice,
        observe: Observer | None = None,
    ) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """For every target relevance of some examples' inputs, and the seed it started from."""
        count = len(inputs[0])
        arguments = pytree.tree_leaves((*take(inputs, rows), *take_arguments(extra, rows, count)))
        own = [take_target(target, range(rows.start, rows.stop), count) for target in targets]
        box = [(low[rows], high[rows]) for low, high in bounds]
        return self.relevance(network, weights, arguments, own, box, observe=observe)

    def relevance(
        self,
        network: Network | FrozenNetwork,
        weights: Callable[[], Values],
        arguments: Sequence[Any],
        targets: Sequence[Target],
        bounds: Sequence[tuple[Tensor, Tensor]],
        *,
        wanted: Wanted | None = None,
        observe: Observer | None = None,
    ) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """For every target relevance of the explained inputs, and the seed it started from.

        Args:
            network: of such arguments.
            weights: gives the model's, where they are not to be read anew.
            arguments: the model's, the explained ones first.
            targets: of these examples.
            bounds: (low, high) of every explained input.
            wanted: at which times of frozen clips relevance is wanted: a `FrozenNetwork` needs this, as no other does.
            observe: as for `Network.backward`; nothing is recorded then.
        """
        if isinstance(network, FrozenNetwork):
            assert wanted is not None
            backward: Backward = partial(network.backward, wanted=wanted)
        else:
            backward = partial(network.backward, observe=observe)

        def run(given: Any, choose: Choose, weights: Callable[[], Values]) -> list[tuple[tuple[Tensor, ...], Tensor]]:
            (arguments, bounds), values = given, weights()
            with native.unchanging(values.values()):
                activations = network.forward(values, arguments)
                seeds = [self.seed_of(activations.output, chosen) for chosen in choose(activations.output)]
                return list(zip(backward(activations, seeds, bounds), seeds, strict=True))

        def choose(scores: Tensor) -> list[Tensor]:
            shape, count = tuple(scores.shape), len(arguments[0])
            if not shape or shape[0] != count:
                raise ValueError(
                    f"the model returns scores of shape {shape} for {count} examples; their first dimension must be the "
                    "examples (does a squeeze or view in the model merge or drop it?)"
                )
            return [target_mask(scores, target) for target in targets]

        given = list(arguments), list(bounds)
        if not self.cuda_graphs or not Replay.serves(arguments[0].device) or observe is not None:
            return run(given, choose, weights)
        model = unwrap(self.model)
        whole = network.network if isinstance(network, FrozenNetwork) else network
        key = (network, self.seed, len(targets), wanted if wanted is None or isinstance(wanted, str) else tuple(wanted))
        anew = partial(whole.weights, model)  # a part of what is recorded
        return self._replay(key, partial(run, weights=anew), given, choose, whole.reads(model))  # type: ignore[no-any-return]

    def _weights_of(self, network: Network) -> Callable[[], Values]:
        """Gives the model's weights, as they are when it is first asked: a recording reads its own."""
        return cache(partial(network.weights, unwrap(self.model)))

    def _network(self, inputs: tuple[Tensor, ...], extra: tuple[Any, ...]) -> Network:
        """The traced network for inputs of this shape, from memory where the model still has the same structure."""
        model = unwrap(self.model)
        scripted = (name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule))
        if (name := next(scripted, None)) is not None:
            raise TypeError(
                f"{name or 'the model'} is a TorchScript module, which torch.export cannot trace; give "
                "the nn.Module it was made of"
            )
        check_evaluation_mode(model)
        count = len(inputs[0])
        options = (self.composite, self.backend, self.precision)
        key = (structure_of(model), options, len(inputs), signature_of((*inputs, *extra), count))
        check_not_tracing()  # before it would wait for itself
        with self._lock:
            for known in (key, (key, count)):
                if known in self._networks:
                    self._networks.move_to_end(known)
                    return self._networks[known]
            try:
                traced = trace(model, (*inputs, *extra), count)
            except InputMismatchError as error:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
                raise ValueError(f"inputs of shape {shapes}: {error}{layout_hint(model, inputs)}") from error.__cause__
            precision = None if self.backend == "reference" else self.precision
            network = Network(model, traced, len(inputs), self.composite, precision)
            key = (structure_of(model), *key[1:])  # a forward that counts its calls in its class has just been called
            self._networks[key if network.any_batch else (key, count)] = network
            while len(self._networks) > _MOST_TRACES:
                self._networks.popitem(last=False)
            return network

    def bounds_of(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """(low, high) for every input, shaped like it, in the precision of the walk."""
        lows, highs = (_per_input(name, bound, len(inputs)) for name, bound in (("low", self.low), ("high", self.high)))
        pairs: list[tuple[Tensor, Tensor]] = []
        for tensor, lower, upper in zip(inputs, lows, highs, strict=True):
            walked = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            like = tensor.new_zeros((), dtype=walked).expand(tensor.shape)
            low, high = broadcast_bound("low", lower, like), broadcast_bound("high", upper, like)
            if bool((without_repeats(low) > without_repeats(high)).any()):
                raise ValueError(f"low must not exceed high, got low={self.low} and high={self.high}")
            pairs.append((low, high))
        return pairs

    def seed_of(self, output: Tensor, chosen: Tensor) -> Tensor:
        """Relevance of the output: the score (or 1) where one is chosen, zero elsewhere."""
        scores = output.detach() if output.dtype == torch.float64 else output.detach().float()
        values = scores if self.seed == "logit" else torch.ones_like(scores)
        return torch.where(chosen, values, torch.zeros_like(values))

    def _findings(self, network: Network, inputs: tuple[Tensor, ...], bounds: list[tuple[Tensor, Tensor]]) -> list[str]:
        """What a user should know before relying on the relevance."""
        findings = list(network.notes)
        hooked = hooked_modules(unwrap(self.model))
        if hooked:
            findings.append(
                f"forward hooks ({', '.join(hooked[:3])}) are not run while explaining: if they change what the model computes, "
                "the model without them is explained"
            )
        if network.mixing:
            findings.append(
                f"{network.mixing} is made of all examples together, so that what is explained depends on which are given at "
                "once; frozen clips are explained one by one. Name the dimensions of one example to keep them apart"
            )
        for tensor, (low, high) in zip(inputs, bounds, strict=True):
            if not lies_within(tensor, low, high):
                findings.append(
                    "pixel values lie outside [low, high]; they are explained by the z-beta formula as it stands, but low and "
                    "high should be the darkest and brightest possible pixel after normalisation (see pixel_bounds)"
                )
        return findings

    def _warn_about(self, findings: Sequence[str]) -> None:
        """Warn of each finding once in the life of this object, at the line that called into the package."""
        for message in dict.fromkeys(findings):
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(message, UserWarning, stacklevel=_level_of_caller())


@dataclass(frozen=True)
class FrozenClips:
    """Explains frozen clips of one shape, each given by the frame that it repeats.

    Attributes:
        method: how they are explained.
        network: the method's network on them.
        weights: gives the model's, as they were when it was first asked.
        bounds: (low, high) of every input, for a frame of one example.
    """

    method: DeepTaylor
    network: FrozenNetwork
    weights: Callable[[], Values]
    bounds: list[tuple[Tensor, Tensor]]

    def explain(
        self, frames: tuple[Tensor, ...], targets: Sequence[Target], extra: tuple[Any, ...], wanted: Wanted
    ) -> list[tuple[Tensor, ...]]:
        """For every target relevance of frozen clips at the times that are wanted.

        Nothing here waits for a GPU, but for what is worked out once: while it works on some clips, the next are prepared.

        Args:
            frames: of every explained input (N, C, 1, H, W).
            targets: each as for `DeepTaylor.attribute`.
            extra: additional arguments of the model's forward.
            wanted: as for `captum_dtd.collapse.FrozenNetwork.backward`, which also says what is returned.
        """
        bounds = [
            (low.expand_as(part), high.expand_as(part)) for (low, high), part in zip(self.bounds, frames, strict=True)
        ]
        leaves = pytree.tree_leaves((*frames, *extra))
        explained = self.method.relevance(self.network, self.weights, leaves, targets, bounds, wanted=wanted)
        return [relevance for relevance, _ in explained]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Chunks of examples as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _varies_in_time(bound: Tensor) -> bool:
    """Whether a pixel bound of clips is more than one number repeated along time."""
    return bound.shape[2] > 1 and bound.stride(2) != 0


def _not_kept(delta: Tensor, scores: Tensor) -> list[str]:
    """What became of relevance whose sum is far from the scores'."""
    left = 1 - delta / scores
    is_finite, is_lost = delta.isfinite(), (left >= 0) & (left <= 1)
    became = {_NOT_FINITE: ~is_finite, _MOSTLY_LOST: is_finite & is_lost, _GROWN: is_finite & ~is_lost}
    return [text for text, examples in became.items() if bool(examples.any())]


_MOSTLY_LOST = (
    "more than half of the relevance was lost on the way to the input (see the convergence delta); "
    "DeepTaylor.ledger(inputs, target) shows where"
)
_GROWN = (
    "the relevance of the input is larger than the score, or of the other sign, by more than half of the score (see the "
    "convergence delta): some denominators of signed terms are near zero, or a bias has taken a share of the other sign; "
    "DeepTaylor.ledger(inputs, target) shows where. z+ or a larger stabilizer is steadier there"
)
_NOT_FINITE = (
    "scores or their relevance are NaN or infinite: weights are, or activations grow out of their type's range; "
    "DeepTaylor.ledger(inputs, target) shows where"
)


def _level_of_caller() -> int:
    """How many calls up the first frame is that is neither of this package nor of the libraries that wrap its methods."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "captum_dtd",
        "captum",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return max(1, level - 1)


def _per_input(name: str, bound: Bound | tuple[Bound, ...], count: int) -> tuple[Bound, ...]:
    """One bound for each of ``count`` inputs: a tuple of numbers for a single input is one value per channel."""
    if not isinstance(bound, tuple) or (count == 1 and all(isinstance(value, numbers.Real) for value in bound)):
        return (bound,) * count  # type: ignore[return-value]
    if len(bound) != count:
        raise ValueError(f"{name} has {len(bound)} entries for {count} inputs; give one for each")
    return bound


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; for a CPU what Linux says is available, or half of what the machine has."""
    if device.type == "cuda":
        # What torch has, but no tensor takes, is there for the next ones.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.sum() for part in parts]).sum()
