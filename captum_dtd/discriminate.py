"""What is relevant for how it looks, and what for how it moves.

A *frozen clip* repeats one frame of a clip T times: the same appearance, no motion. Explaining it gives the relevance that
appearance alone earns; what the clip itself earns beyond that is due to motion (Hiley et al. 2019, arXiv 1908.01536)::

    total     = relevance of the clip, summed over colour channels
    spatial_t = read-out of the relevance of the clip frozen at frame t
    temporal  = total - spatial

`captum_dtd.SelectiveRelevance` (Hiley et al. 2020, arXiv 2003.14285) answers the same question from one explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from captum.attr import Attribution, DeepLiftShap, GradientShap
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from captum_dtd import native
from captum_dtd.attribution import Backend, CompositeLike, DeepTaylor, Seed
from captum_dtd.bounds import Bound
from captum_dtd.collapse import Wanted
from captum_dtd.frame_cache import FrameCache, digest, weights_of
from captum_dtd.inputs import (
    Target,
    as_arguments,
    as_tuple,
    check_batch_size,
    check_option,
    check_targets,
    checked_inputs,
    order_hint,
    take_arguments,
    take_target,
)
from captum_dtd.kernels import Precision
from captum_dtd.modes import uncompiled
from captum_dtd.structure import ordinary, structure_of, unwrap, value_of
from captum_dtd.tables import RuleTable

Readout: TypeAlias = Literal["own", "first", "mean"]
"""Which slice of a frozen clip's explanation is frame t's spatial relevance: slice t, slice 0, or the mean over slices."""

Normalize: TypeAlias = Literal["none", "max", "sum"]
"""What total and each frozen explanation are divided by: nothing, or their own max |R| or |sum of R| over all slices."""

# Frozen clips at once, as a method that is not ours is given them.
_FROZEN_CLIPS = 4
# As ours is: so many clips, or what takes so many bytes if that is more. On a CPU more need memory, and gain speed only where a
# clip is so small that calling operations takes as long as they do; elsewhere calls have to keep ahead of thousands of cores.
_ENOUGH = {"cpu": (4, 2**28)}
_ENOUGH_ELSEWHERE = (64, 2**33)


_Item = TypeVar("_Item")


class SpatioTemporalRelevance(NamedTuple):
    """Relevance for appearance and for motion, maps (N, T, H, W) with ``total = spatial + temporal``.

    Attributes:
        spatial: what each frame alone earns.
        temporal: what is due to motion; negative where motion speaks against the target.
        total: relevance of the clip, summed over colour channels.
    """

    spatial: Tensor
    temporal: Tensor
    total: Tensor


class DiscriminativeRelevance(Attribution):  # type: ignore[misc]
    """Spatial and temporal relevance by any Captum attribution method: explains the clip and each of its frozen clips.

    Args:
        method: a Captum method whose ``attribute`` takes clips (N, C, T, H, W) and returns maps of that shape.
        readout: which slice of a frozen clip's explanation counts: ``"own"`` (slice t of frozen clip t, comparable with
            slice t of the total), ``"first"`` (slice 0, as in the paper's published scripts) or ``"mean"``.
        normalize: ``"none"``, ``"max"`` (of the absolute value) or ``"sum"`` (its absolute value): what total and each frozen
            explanation are divided by, over all their slices, before they are subtracted.

    Raises:
        TypeError: if ``method`` is not a Captum attribution method.
        ValueError: if an option does not exist.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_dtd import DiscriminativeRelevance
        >>> from captum_dtd.models import c3d_mini
        >>> method = DiscriminativeRelevance(InputXGradient(c3d_mini().eval()))
        >>> maps = method.attribute(torch.rand(1, 3, 4, 32, 32), target=2)
        >>> maps.temporal.shape
        torch.Size([1, 4, 32, 32])
    """

    def __init__(self, method: Attribution, *, readout: Readout = "own", normalize: Normalize = "none") -> None:
        if not isinstance(method, Attribution):
            raise TypeError(f"method must be a captum.attr.Attribution, got {type(method).__name__}")
        check_option("readout", readout, get_args(Readout))
        check_option("normalize", normalize, get_args(Normalize))
        super().__init__(method.forward_func)
        self.method = method
        self.readout = readout
        self.normalize = normalize

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
        **kwargs: Any,
    ) -> Any:
        """Spatial, temporal and total relevance of every pixel for the target's score.

        Args:
            inputs: clips (N, C, T, H, W), or a tuple of such tensors with the same N and T (RGB and flow, say).
            target: which output is explained, in any of Captum's forms; a clip's target is that of all its frozen clips.
            additional_forward_args: further arguments of the model's forward; tensors with N rows are batched along.
            return_convergence_delta: also return the method's convergence delta of the total, before any normalisation.
            internal_batch_size: how many frozen clips are explained at once; by default 4.
            show_progress: show a progress bar.
            **kwargs: handed to the method's own ``attribute``. Tensors with N rows (baselines, feature masks) belong to their
                clips, and so to these clips' frozen clips; the baselines of methods that draw from them are for all.

        Returns:
            `SpatioTemporalRelevance` of (N, T, H, W) maps, itself a tuple (a tuple of them for several inputs), in the units
            of the score unless normalised. A clip without motion has no temporal relevance with read-out "own". With
            ``return_convergence_delta`` a pair of that and the delta (N,).

        Raises:
            TypeError, ValueError: as the method's ``attribute``, and if the inputs are not clips (N, C, T, H, W).
        """
        (result,) = self._attribute(
            self._read_whole_clips,
            inputs,
            [target],
            additional_forward_args,
            return_convergence_delta,
            internal_batch_size,
            show_progress,
            **kwargs,
        )
        return result

    def _check_maps(self, maps: Any, clips: tuple[Tensor, ...]) -> None:
        """Raise TypeError unless these are maps of the clips, of any number of channels."""
        parts = maps if isinstance(maps, tuple) else (maps,)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        wanted = [tuple(clip.shape) for clip in clips]
        fits = [
            isinstance(shape, tuple) and shape[:1] + shape[2:] == clip[:1] + clip[2:]
            for shape, clip in zip(shapes, wanted, strict=False)
        ]
        if len(shapes) != len(wanted) or not all(fits):
            raise TypeError(
                f"method must return maps shaped like its inputs, {', '.join(map(str, wanted))}; {self.method.get_name()} "
                f"returned {', '.join(map(str, shapes))} (a method that discriminates already needs no wrapping)"
            )

    def _attribute(
        self,
        make_reader: Callable[..., _Reader],
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target],
        additional_forward_args: Any,
        return_convergence_delta: bool,
        internal_batch_size: int | None,
        show_progress: bool,
        **kwargs: Any,
    ) -> list[Any]:
        """One result of `attribute` for each target."""
        clips, extra = checked_inputs(inputs), as_arguments(additional_forward_args)
        check_clips(clips)
        # Many methods set requires_grad on what they are given: let that be a view, not the caller's tensor.
        clips = tuple(ordinary(clip) for clip in clips)
        check_batch_size(internal_batch_size)
        count, frames = clips[0].shape[0], clips[0].shape[2]
        if return_convergence_delta and not self.method.has_convergence_delta():
            raise ValueError(f"return_convergence_delta: {self.method.get_name()} has no convergence delta")

        is_drawn_from = isinstance(self.method, (GradientShap, DeepLiftShap)) or kwargs.get(
            "draw_baseline_from_distrib"
        )
        of_all = {"baselines": kwargs.pop("baselines")} if is_drawn_from and "baselines" in kwargs else {}

        def explain(
            examples: tuple[Tensor, ...], rows: list[int], targets: Sequence[Target], **options: Any
        ) -> list[Any]:
            return self._explain(
                examples if isinstance(inputs, tuple) else examples[0],
                [take_target(target, rows, count) for target in targets],
                take_arguments(extra, rows, count) or None,
                internal_batch_size,
                **dict(zip(kwargs, take_arguments(tuple(kwargs.values()), rows, count), strict=True)),
                **of_all,
                **options,
            )

        with tqdm(total=count * (1 + frames), desc=self.get_name(), unit="clip", disable=not show_progress) as progress:
            every = list(range(count))
            # Before anything else is asked of a GPU, since the answer has to come back from it.
            alike = [_first_alike(tuple(part[row] for part in clips)) for row in every]
            reader = make_reader(clips, extra, targets, explain)  # refuses what it does not take, before any work
            if return_convergence_delta:
                explained, deltas = zip(*explain(clips, every, targets, return_convergence_delta=True), strict=True)
            else:
                explained, deltas = tuple(explain(clips, every, targets)), (None,) * len(targets)
            for one in explained:
                self._check_maps(one, clips)
            unscaled = [_over_channels(one) for one in explained]
            progress.update(count)
            size = self._frozen_at_once(clips, extra, internal_batch_size)
            looks = [tuple(torch.empty_like(part) for part in parts) for parts in unscaled]
            jobs: list[_Job] = []
            for row, first in enumerate(alike):
                times_of = {frame: tuple(t for t in range(frames) if first[t] == frame) for frame in sorted(set(first))}
                if len(times_of) > 1:
                    jobs += [_Job(row, frame, times) for frame, times in times_of.items()]
                    continue
                # All frames are equal: the clip is its own frozen clip, and one explanation serves as both.
                for look, part in zip(_flat(looks), _flat(unscaled), strict=True):
                    scaled = normalised(part[row : row + 1], self.normalize)[0]
                    look[row] = read_out(scaled, range(frames), self.readout)
                progress.update(frames)
            for chosen in (jobs[start : start + size] for start in range(0, len(jobs), size)):
                for look, maps in zip(_flat(looks), _flat(reader(chosen)), strict=True):
                    for job, spatial in zip(chosen, maps, strict=True):
                        for time, one in zip(job.times, spatial.expand(len(job.times), -1, -1), strict=True):
                            look[job.row, time] = one
                progress.update(sum(len(job.times) for job in chosen))
        results: list[Any] = []
        for own_looks, parts, delta in zip(looks, unscaled, deltas, strict=True):
            totals = [normalised(part, self.normalize) for part in parts]
            maps_of = tuple(SpatioTemporalRelevance(a, b - a, b) for a, b in zip(own_looks, totals, strict=True))
            result = maps_of if len(maps_of) > 1 else maps_of[0]
            results.append((result, delta) if return_convergence_delta else result)
        return results

    def _explain(
        self, inputs: Any, targets: list[Target], arguments: Any, internal_batch_size: int | None, **options: Any
    ) -> list[Any]:
        """The method's own results, one for each target; other Captum methods use ``internal_batch_size`` for other things."""
        explain = partial(self.method.attribute, inputs, additional_forward_args=arguments, **options)
        return [explain(target=target) for target in targets]

    def _read_whole_clips(
        self, clips: tuple[Tensor, ...], extra: tuple[Any, ...], targets: Sequence[Target], explain: _Explain
    ) -> _Reader:
        """Explains whole frozen clips, as the method explains any clip."""
        return lambda jobs: [
            [self._read_out(maps, jobs) for maps in parts] for parts in _whole(clips, explain, jobs, targets)
        ]

    def _read_out(self, explanations: Tensor, jobs: Sequence[_Job]) -> list[Tensor]:
        """What whole explanations of frozen clips (N, T, H, W) say about their frames, normalised."""
        scaled = normalised(explanations, self.normalize)
        return [read_out(one, job.times, self.readout) for one, job in zip(scaled, jobs, strict=True)]

    def frozen_batch(self, clips: tuple[Tensor, ...], extra: tuple[Any, ...] = ()) -> int:
        """How many frozen clips are explained at once where ``internal_batch_size`` does not say.

        Args:
            clips: inputs (N, C, T, H, W); shapes and types matter, values do not.
            extra: additional arguments of the model's forward, likewise.
        """
        return _FROZEN_CLIPS

    def _frozen_at_once(
        self, clips: tuple[Tensor, ...], extra: tuple[Any, ...], internal_batch_size: int | None
    ) -> int:
        return internal_batch_size or self.frozen_batch(clips, extra)

    def has_convergence_delta(self) -> bool:
        """Whether the underlying method has one."""
        return bool(self.method.has_convergence_delta())

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the underlying method."""
        return bool(self.method.multiplies_by_inputs)

    def compute_convergence_delta(self, attributions: Any, output: Tensor) -> Tensor:
        """``output - sum of total``, one value per example (N,), for maps that are not normalised.

        Args:
            attributions: `SpatioTemporalRelevance`, a tuple of them, or a total map (N, T, H, W).
            output: the target's score, (N,).
        """
        parts = (attributions,) if isinstance(attributions, (SpatioTemporalRelevance, Tensor)) else attributions
        totals = [part.total if isinstance(part, SpatioTemporalRelevance) else part for part in parts]
        return output.flatten() - torch.stack([total.flatten(1).sum(1) for total in totals]).sum(0)


class _Default(str):
    """An option's default, told apart from the same word given by the caller."""


_OWN, _NONE, _LOGIT = _Default("own"), _Default("none"), _Default("logit")

PRESETS: dict[str, dict[str, str]] = {"hiley2019": {"readout": "first", "normalize": "max", "seed": "one"}}
"""What a preset stands for. ``hiley2019`` is what the paper's published scripts do; pixel bounds stay the caller's."""


class DiscriminativeDeepTaylor(DiscriminativeRelevance):
    """Spatial and temporal relevance by deep Taylor decomposition (Hiley et al. 2019, arXiv 1908.01536).

    Args:
        model: as for `DeepTaylor`.
        low: darkest possible pixel after normalisation, as for `DeepTaylor`, the same for all examples.
        high: brightest possible pixel.
        readout: ``"own"``, ``"first"`` or ``"mean"``, as for `DiscriminativeRelevance`.
        normalize: ``"none"``, ``"max"`` or ``"sum"``, as for `DiscriminativeRelevance`.
        preset: ``"hiley2019"`` sets seed "one", normalize "max" and readout "first"; beside one of these options with
            another value it is an error.
        composite: as for `DeepTaylor`.
        seed: as for `DeepTaylor`.
        backend: as for `DeepTaylor`.
        precision: as for `DeepTaylor`.
        cuda_graphs: as for `DeepTaylor`; of frozen clips as well.

    Raises:
        TypeError, ValueError: as `DeepTaylor` and `DiscriminativeRelevance`, and for a preset that does not exist or
            contradicts another argument.

    Example:
        >>> import torch
        >>> from captum_dtd import DiscriminativeDeepTaylor
        >>> from captum_dtd.models import c3d_mini
        >>> method = DiscriminativeDeepTaylor(c3d_mini().eval(), low=0.0, high=1.0)
        >>> spatial, temporal, total = method.attribute(torch.rand(1, 3, 4, 32, 32), target=2)
        >>> bool(torch.allclose(spatial + temporal, total))
        True
    """

    method: DeepTaylor

    def __init__(
        self,
        model: nn.Module,
        low: Bound | tuple[Bound, ...],
        high: Bound | tuple[Bound, ...],
        *,
        readout: Readout = _OWN,  # type: ignore[assignment]
        normalize: Normalize = _NONE,  # type: ignore[assignment]
        preset: str | None = None,
        composite: CompositeLike = "dtd",
        seed: Seed = _LOGIT,  # type: ignore[assignment]
        backend: Backend = "auto",
        precision: Precision = "float32",
        cuda_graphs: bool = False,
    ) -> None:
        options = {"readout": readout, "normalize": normalize, "seed": seed}
        if preset is not None:
            check_option("preset", preset, tuple(PRESETS))
            for name, value in PRESETS[preset].items():
                if not isinstance(options[name], _Default) and options[name] != value:
                    raise ValueError(
                        f"preset {preset!r} means {name}={value!r}, but {name}={options[name]!r} is given; leave one of them out"
                    )
            options |= PRESETS[preset]  # type: ignore[arg-type]
        chosen: dict[str, Any] = {name: str(value) for name, value in options.items()}
        method = DeepTaylor(
            *(model, low, high),
            composite=composite,
            seed=chosen["seed"],
            backend=backend,
            precision=precision,
            cuda_graphs=cuda_graphs,
        )
        super().__init__(method, readout=chosen["readout"], normalize=chosen["normalize"])
        self.preset = preset

    @property
    def model(self) -> nn.Module:
        """The network to explain, which is the method's."""
        return self.method.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.method.model = model

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
        frame_cache: FrameCache | None = None,
    ) -> Any:
        """Spatial, temporal and total relevance of every pixel for the target's score; see `DiscriminativeRelevance.attribute`.

        Args:
            inputs: clips (N, C, T, H, W), as the model takes them, or a tuple of such tensors with the same N and T.
            target: which output is explained, in any of Captum's forms.
            additional_forward_args: further arguments of the model's forward, not explained.
            return_convergence_delta: also return ``seed - sum of total``, before any normalisation, one value per example.
            internal_batch_size: how many clips are explained at once; by default as many as free memory allows, of frozen
                clips at most 4 (on a GPU 64), or more where they are small.
            show_progress: show a progress bar.
            frame_cache: explanations of frames that earlier clips showed too, and where to keep new ones; for windows of a
                video that overlap.

        Returns:
            `SpatioTemporalRelevance` of (N, T, H, W) maps, or a pair of that and the delta (N,).

        Raises:
            TypeError, ValueError, UnsupportedOperationError: as `DeepTaylor.attribute`, and TypeError if ``frame_cache`` is
                something else.
        """
        (result,) = self.attribute_targets(
            inputs,
            [target],
            additional_forward_args,
            return_convergence_delta,
            internal_batch_size=internal_batch_size,
            show_progress=show_progress,
            frame_cache=frame_cache,
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
        frame_cache: FrameCache | None = None,
    ) -> list[Any]:
        """What `attribute` returns for each of several targets of the same inputs, for less than their sum in time.

        The targets share forward passes and denominators, of the clips and of all their frozen clips.

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
            >>> method = DiscriminativeDeepTaylor(c3d_mini().eval(), low=0.0, high=1.0)
            >>> [maps.temporal.shape for maps in method.attribute_targets(torch.rand(1, 3, 8, 32, 32), [3, 7])]
            [torch.Size([1, 8, 32, 32]), torch.Size([1, 8, 32, 32])]
        """
        if frame_cache is not None and not isinstance(frame_cache, FrameCache):
            raise TypeError(f"frame_cache must be a captum_dtd.FrameCache, got {type(frame_cache).__name__}")
        check_targets(targets)
        for name, bound in (("low", self.method.low), ("high", self.method.high)):
            check_same_for_all_examples(name, bound)
        with native.unchanging(unwrap(self.method.model).parameters()):
            return self._attribute(
                partial(self._read_distinct_times, frame_cache, internal_batch_size),
                inputs,
                [target.cpu() if isinstance(target, Tensor) else target for target in targets],
                additional_forward_args,
                return_convergence_delta,
                internal_batch_size,
                show_progress,
            )

    @uncompiled
    def rule_table(self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: Any = None) -> RuleTable:
        """As `DeepTaylor.rule_table`, with how many times of a frozen clip every operation computes.

        Args:
            inputs: clips (N, C, T, H, W), as for `attribute`; shapes and types matter, values do not.
            additional_forward_args: as for `attribute`.

        Raises:
            ValueError: as `attribute` does for inputs that the model does not take.

        Example:
            >>> import torch
            >>> from captum_dtd.models import c3d_mini
            >>> method = DiscriminativeDeepTaylor(c3d_mini().eval(), low=0.0, high=1.0)
            >>> [row.times for row in method.rule_table(torch.rand(1, 3, 16, 32, 32)).rows][:3]
            ['1 -> 3 of 16', '3 -> 3 of 16', '3 -> 3 of 16']
        """
        clips = checked_inputs(inputs)
        check_clips(clips)
        return self.method.frozen_rule_table(clips, as_arguments(additional_forward_args))

    def _read_distinct_times(
        self,
        cache: FrameCache | None,
        internal_batch_size: int | None,
        clips: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        targets: Sequence[Target],
        explain: _Explain,
    ) -> _Reader:
        """Explains frozen clips at distinct times only, and walks relevance back no further than it is read."""
        count, length = clips[0].shape[0], clips[0].shape[2]
        some = _at_once(clips, extra, internal_batch_size)
        frozen = self.method.frozen_clips(*some)
        fixed = self.method.fixed_batch(*some) if frozen is None else None

        def arguments(jobs: Sequence[_Job], targets: Sequence[Target]) -> tuple[list[Target], tuple[Any, ...]]:
            rows = [job.row for job in jobs]
            return [take_target(target, rows, count) for target in targets], take_arguments(extra, rows, count)

        def relevance(jobs: Sequence[_Job], wanted: Wanted, targets: Sequence[Target]) -> list[tuple[Tensor, ...]]:
            if frozen is None:
                return _whole_in_groups(clips, explain, jobs, targets, fixed or len(jobs))
            frames = tuple(_frames(part, jobs) for part in clips)
            return [_over_channels(one) for one in frozen.explain(frames, *arguments(jobs, targets), wanted)]

        def read(jobs: list[_Job]) -> list[list[list[Tensor]]]:
            if self.normalize != "none" or frozen is None:
                return [[self._read_out(maps, jobs) for maps in parts] for parts in relevance(jobs, "all", targets)]
            if self.readout == "mean":
                return [[list(maps / length) for maps in parts] for parts in relevance(jobs, "classes", targets)]
            if self.readout == "first":
                return [[list(maps) for maps in parts] for parts in relevance(jobs, [(0,)] * len(jobs), targets)]
            wanted = [job.times for job in jobs]
            return [
                [[one[: len(times)] for one, times in zip(maps, wanted, strict=True)] for maps in parts]
                for parts in relevance(jobs, wanted, targets)
            ]

        if cache is None:
            return read
        method = self.method
        model = unwrap(method.model)
        others = tuple(value_of(leaf) for leaf in pytree.tree_leaves(extra) if not isinstance(leaf, Tensor))
        how = (structure_of(model), others, method.composite, method.seed, method.backend, method.precision)
        context = digest((cache.number_of(how), method.low, method.high, weights_of(model), length))

        def whole(jobs: list[_Job], target: Target) -> list[Tensor]:
            """Whole explanations of the jobs' frames (jobs, T, H, W), of every input, from the cache as far as they are there."""
            keys = [
                digest((context, [_frames(part, [job]) for part in clips], *arguments([job], [target]))) for job in jobs
            ]
            known: dict[bytes, tuple[Tensor, ...]] = {}
            missing: dict[bytes, _Job] = {}
            for key, job in zip(keys, jobs, strict=True):
                found = None if key in missing else cache.get(key)
                if found is None:
                    missing[key] = job
                else:
                    known[key] = found
            if missing:
                (explained,) = relevance(list(missing.values()), "all", [target])
                for key, *maps in zip(missing, *explained, strict=True):
                    known[key] = tuple(maps)
                    cache.put(key, known[key])
            return [torch.stack(list(maps)) for maps in zip(*(known[key] for key in keys), strict=True)]

        def read_cached(jobs: list[_Job]) -> list[list[list[Tensor]]]:
            return [[self._read_out(maps, jobs) for maps in whole(jobs, target)] for target in targets]

        return read_cached

    def _explain(
        self, inputs: Any, targets: list[Target], arguments: Any, internal_batch_size: int | None, **options: Any
    ) -> list[Any]:
        return self.method.attribute_targets(
            inputs, targets, arguments, internal_batch_size=internal_batch_size, **options
        )

    def _frozen_at_once(
        self, clips: tuple[Tensor, ...], extra: tuple[Any, ...], internal_batch_size: int | None
    ) -> int:
        if len(clips[0]) > 0:
            most = self.method.frozen_together(*_at_once(clips, extra, internal_batch_size))
            if most is not None:
                return most
        return super()._frozen_at_once(clips, extra, internal_batch_size)

    def frozen_batch(self, clips: tuple[Tensor, ...], extra: tuple[Any, ...] = ()) -> int:
        """As many as half of the memory that is free now allows, as far as more are faster on the clips' device.

        Where they are more than a clip has frames, those of whole clips: the next ones then are alike.
        """
        enough = _ENOUGH.get(clips[0].device.type, _ENOUGH_ELSEWHERE)
        size, frames = self.method.affordable_batch(clips, extra, enough=enough), clips[0].shape[2]
        return size - size % frames if size > frames > 0 else size


def _at_once(
    clips: tuple[Tensor, ...], extra: tuple[Any, ...], internal_batch_size: int | None
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """As many clips, and what belongs to them, as are explained at once: the model's code may fix how many it takes."""
    count = len(clips[0])
    first = slice(0, min(internal_batch_size or count, count))
    return tuple(clip[first] for clip in clips), take_arguments(extra, first, count)


def check_clips(clips: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless every input is a batch of clips (N, C, T, H, W), with as many frames as the first."""
    for clip in clips:
        if clip.ndim != 5:
            raise ValueError(f"inputs must be clips (N, C, T, H, W), got shape {tuple(clip.shape)}{order_hint(clip)}")
        if clip.shape[2] != clips[0].shape[2]:
            raise ValueError(
                f"inputs have {clips[0].shape[2]} and {clip.shape[2]} frames; freezing a frame needs the same times in all "
                "inputs: explain a module that takes all frames and picks those of each input itself, x[:, :, ::4], say"
            )


def check_same_for_all_examples(name: str, bound: Bound | tuple[Bound, ...]) -> None:
    """Raise ValueError if a pixel bound, or one of several, has an entry for each example: frozen clips are others."""
    for part in bound if isinstance(bound, tuple) else (bound,):
        shape = tuple(getattr(part, "shape", ()))
        if len(shape) == 5 and shape[0] != 1:
            raise ValueError(
                f"{name} of shape {shape} differs from example to example; to explain frozen clips too, give a number, one "
                "number per channel, or a tensor (1, C, T, H, W)"
            )


class _Job(NamedTuple):
    """A frame that is to be explained: in which example it stands, where first, and at which times it is shown."""

    row: int
    frame: int
    times: tuple[int, ...]


_Reader: TypeAlias = Callable[[list[_Job]], list[list[list[Tensor]]]]
"""Gives, for every target, input and job, spatial relevance (times, H, W) at the times at which the job's frame is shown."""

_Explain: TypeAlias = Callable[..., list[Any]]
"""The method on some clips, given which rows' targets and arguments are theirs: ``(clips, rows, targets, **options)``."""


def _whole(
    clips: tuple[Tensor, ...], explain: _Explain, jobs: Sequence[_Job], targets: Sequence[Target]
) -> list[tuple[Tensor, ...]]:
    """For every target and input, relevance of the jobs' whole frozen clips (jobs, T, H, W)."""
    frozen = tuple(_frames(part, jobs).expand(-1, -1, part.shape[2], -1, -1) for part in clips)
    return [_over_channels(one) for one in explain(frozen, [job.row for job in jobs], targets)]


def _whole_in_groups(
    clips: tuple[Tensor, ...], explain: _Explain, jobs: Sequence[_Job], targets: Sequence[Target], size: int
) -> list[tuple[Tensor, ...]]:
    """The same, by so many clips at once, neither more nor less: those that are explained together, all frozen at one frame.

    Each stays in its place, since a model that takes so many may treat them differently. Where some are missing the last one is
    repeated.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault((job.row // size, job.frame), []).append(number)
    found: dict[int, list[tuple[Tensor, ...]]] = {}
    for (group, _), numbers in groups.items():
        rows = range(group * size, min((group + 1) * size, len(clips[0])))
        together = [jobs[numbers[0]]._replace(row=row) for row in (*rows, *[rows[-1]] * (size - len(rows)))]
        maps = _whole(clips, explain, together, targets)
        for number in numbers:
            place = jobs[number].row - rows.start
            found[number] = [tuple(part[place] for part in of_target) for of_target in maps]
    in_order = [found[number] for number in range(len(jobs))]
    return [tuple(map(torch.stack, zip(*of_target, strict=True))) for of_target in zip(*in_order, strict=True)]


def _frames(clips: Tensor, jobs: Sequence[_Job]) -> Tensor:
    """The jobs' frames of clips (N, C, T, H, W), as (jobs, C, 1, H, W)."""
    return torch.stack([clips[job.row, :, job.frame] for job in jobs]).unsqueeze(2)


def distinct_frames(clip: Tensor) -> Tensor:
    """For each frame of a clip (C, T, H, W) the first frame that is bit-equal to it, (T,) integers.

    Loop-padded and still clips repeat frames; equal frames have equal frozen clips, which then are explained once.
    """
    frames = clip.detach().transpose(0, 1).flatten(1)
    # Equal frames have equal sums: only those are compared, so the cost is linear in T where frames differ.
    sums = frames.double().sum(1).tolist()
    first: list[int] = []
    for t, total in enumerate(sums):
        earlier = (s for s in sorted(set(first)) if sums[s] == total and torch.equal(frames[s], frames[t]))
        first.append(next(earlier, t))
    return torch.tensor(first, device="cpu")


def read_out(explanation: Tensor, times: Sequence[int], readout: Readout) -> Tensor:
    """What a frozen clip's explanation (T, H, W) says about its frame, for the times the frame is shown: (len(times), H, W)."""
    if readout == "own":
        return torch.stack([explanation[time] for time in times])
    return (explanation[0] if readout == "first" else explanation.mean(0)).expand(len(times), -1, -1)


def normalised(relevance: Tensor, normalize: Normalize) -> Tensor:
    """Maps (N, T, H, W), each divided by its own max |R| or |sum of R| over all slices; zeros stay zeros, signs stay signs."""
    if normalize == "none":
        return relevance
    flat = relevance.flatten(1)
    scale = flat.abs().amax(1) if normalize == "max" else flat.sum(1).abs()
    return relevance / torch.where(scale == 0, torch.ones_like(scale), scale).view(-1, 1, 1, 1)


def _first_alike(clip: tuple[Tensor, ...]) -> list[int]:
    """For each time the first time at which every part of the clip shows the same frame."""
    codes = list(zip(*(distinct_frames(part).tolist() for part in clip), strict=True))
    return [codes.index(code) for code in codes]


def _flat(of_targets: Sequence[Sequence[_Item]]) -> list[_Item]:
    """What there is for every target and input, one after the other."""
    return [item for items in of_targets for item in items]


def _over_channels(relevance: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.detach().sum(1) for part in as_tuple(relevance))
