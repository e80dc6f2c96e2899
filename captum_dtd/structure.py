"""What a model is made of: its tensors and hooks, when it has become another one, and a copy that shares its tensors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import weakref
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.parameter import is_lazy


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor without its history; an inference tensor, which may not take part in differentiation, is copied."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def structure_of(model: nn.Module) -> tuple[object, ...]:
    """A value that changes when modules are replaced or reconfigured, and does not when only weights change.

    It covers what a trace depends on: the modules, their settings and other plain attributes, those of their classes and the
    methods among them, which parameters and buffers they have, of which shapes and types, and hooks that run before their
    forward or around that of any module. Attributes are compared by value as far as they are numbers, strings, NumPy arrays,
    and lists, deques, dicts, sets, dataclasses and namespaces of such; tensors and other objects by identity. Globals that a
    forward reads are not covered.
    """
    classes = dict.fromkeys(map(type, model.modules()))
    modules = tuple(
        (
            name,
            _Same(module),
            _Same(type(module)),
            module.extra_repr(),
            tuple((key, _kind_of(tensor)) for key, tensor in (*module._parameters.items(), *module._buffers.items())),
            tuple(map(_Same, module._forward_pre_hooks.values())),
            tuple((key, value_of(value)) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE),
        )
        for name, module in model.named_modules()
    )
    return tuple(map(_class_attributes, classes)), modules, tuple(map(_Same, _hooks_of_all_modules()))


def _kind_of(tensor: Tensor | None) -> object:
    """What of a tensor a trace depends on: numbers of channels, say, of a layer that was pruned."""
    if tensor is None or is_lazy(tensor):
        return None if tensor is None else "not initialised"
    return tuple(tensor.shape), tensor.dtype


def _class_attributes(cls: type) -> tuple[object, ...]:
    """What a module's class and its bases say; of torch's own which functions their forwards are."""
    said = ((key, value_of(value)) for base in own_classes(cls) for key, value in vars(base).items() if key[:2] != "__")
    return _Same(inspect.getattr_static(cls, "forward")), *said


def own_classes(cls: type) -> Iterator[type]:
    """A module's class and its bases, but those of torch and of Python."""
    return (
        base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc")
    )


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


class _Same:
    """Equal to what stands for the same object, as long as that lives: numbers of objects that are gone are given again."""

    def __init__(self, value: object) -> None:
        self._number = id(value)
        try:
            self._get: Callable[[], object] = weakref.ref(value)
        except TypeError:  # it stays as long as this does
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is not None and self._get() is other._get()

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return f"object {self._number}"


def value_of(value: Any, depth: int = 8) -> object:
    """What an attribute is compared by; below so many containers, which may hold each other, by identity."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value), value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, str(value.dtype), hashlib.blake2b(value.tobytes()).digest()
    if depth == 0:
        return _Same(value)
    inner = partial(value_of, depth=depth - 1)
    if isinstance(value, (list, tuple, deque)):
        return type(value), tuple(map(inner, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(inner, value))
    if isinstance(value, Mapping):
        return type(value), tuple((inner(key), inner(each)) for key, each in value.items())
    if _has_fields(value):
        return _Same(value), inner(_fields_of(value))
    return _Same(value)


def _has_fields(value: object) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (SimpleNamespace, Namespace))


def _fields_of(value: Any) -> dict[str, Any]:
    """Of a dataclass, with slots or not, or a namespace."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return {field.name: getattr(value, field.name, None) for field in fields} | getattr(value, "__dict__", {})


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or tensor attribute that ``name`` (dotted) stands for in ``model`` now."""
    *path, last = name.split(".")
    owner: Any = model
    for step in path:
        owner = getattr(owner, step)
    tensor = getattr(owner, last)
    assert isinstance(tensor, Tensor)
    return tensor


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """Tensors in what `value_of` looks into: a trace shares them, so that a change in place is seen."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and not isinstance(value, nn.Module):
        parts: Iterable[Any] = ()
        if isinstance(value, (list, tuple, deque, set, frozenset)):
            parts = value
        elif isinstance(value, Mapping):
            parts = value.values()
        elif _has_fields(value):
            parts = _fields_of(value).values()
        for part in parts:
            yield from tensors_in(part, depth - 1)


def _is_part_of_the_model(pre_hook: object) -> bool:
    """weight_norm, spectral_norm and pruning of torch.nn.utils compute the weight in a hook before the module runs."""
    return type(pre_hook).__module__.startswith("torch.nn.utils.")


def _is_of_an_export(hook: object) -> bool:
    """What torch.export made of a model has hooks that check and flatten arguments."""
    return str(getattr(hook, "__module__", "")).startswith("torch.export.")


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of the modules with hooks of the user's of their own around their forward, which do not run in a trace."""
    return [
        name or "the model"
        for name, module in model.named_modules()
        if not all(map(_is_of_an_export, module._forward_hooks.values()))
        or not all(_is_part_of_the_model(hook) or _is_of_an_export(hook) for hook in module._forward_pre_hooks.values())
    ]


def _hooks_of_all_modules() -> list[object]:
    """What `torch.nn.modules.module.register_module_forward_hook` and its kin were given: it runs in a trace, too."""
    return [*_global_forward_pre_hooks.values(), *_global_forward_hooks.values()]


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor and carries none of the user's hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [leaf for value in vars(module).values() for leaf in tensors_in(value)]
    shared: dict[int, Any] = {id(tensor): _shareable(tensor) for tensor in tensors}
    try:
        double = copy.deepcopy(model, dict(shared))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied for tracing ({_uncopied(model, shared) or 'its own attributes'}: {error}); "
            "replace what it holds of that kind by what copy.deepcopy takes, a TorchScript function by the Python function "
            "that it was made of"
        ) from error
    for module in double.modules():
        for tensors_by_name in (module._parameters, module._buffers):
            # What a lazy module has not made yet nothing reads, or the trace fails and says so.
            tensors_by_name.update(
                {name: None for name, each in tensors_by_name.items() if each is not None and is_lazy(each)}
            )
        module._forward_hooks = OrderedDict()
        module._backward_hooks = OrderedDict()
        module._backward_pre_hooks = OrderedDict()
        module._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in module._forward_pre_hooks.items() if _is_part_of_the_model(hook)
        )
    return double


def _uncopied(model: nn.Module, shared: dict[int, Any]) -> str:
    """The first attribute of the model's modules that cannot be copied."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OF_EVERY_MODULE:
                try:
                    copy.deepcopy(value, dict(shared))
                except Exception:
                    return ".".join(filter(None, (name, key)))
    return ""


def _shareable(tensor: Tensor) -> Tensor:
    if is_lazy(tensor) or not tensor.is_inference():
        return tensor
    return nn.Parameter(ordinary(tensor), requires_grad=False) if isinstance(tensor, nn.Parameter) else ordinary(tensor)
