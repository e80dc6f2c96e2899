"""Whole nets as users write them: explained as the oracle says, whatever the model is wrapped in, left as found."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ZOO, Case, Refused, between, zoo
from oracle import assert_agrees, explain
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from captum_dtd import DeepTaylor
from captum_dtd.graph import UnsupportedOperationError, trace
from captum_dtd.rules import Epsilon

NAMES = [case.name for case in ZOO]
LOSSLESS = [
    "plain",
    "residual",
    "pools",
    "sums",
    "images",
    "slow-fast",
    "normalising",
    "map-head",
    "arguments",
    "two-inputs",
]
TARGETS = [0, 2, 4]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def every(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def outputs(model: nn.Module, case: Case, x: Any) -> Tensor:
    with torch.no_grad():
        return model(*every(x), *case.args)


def total(relevance: Any) -> Tensor:
    return sum(r.flatten(1).sum(1) for r in every(relevance))


@functools.cache
def prepared(name: str) -> tuple[Case, nn.Module, Any, DeepTaylor]:
    """A net of the zoo, three inputs, and one method that several tests call, as a user's would be."""
    case = zoo(name)
    model = case.model()
    return case, model, case.inputs(3), DeepTaylor(model, case.low, case.high)


def run(case: Case, model: nn.Module, x: Any, targets: Any = None, seed: str = "logit", **options: Any) -> Any:
    method = DeepTaylor(model, case.low, case.high, seed=seed, **options)
    return method.attribute(x, torch.tensor(TARGETS if targets is None else targets), case.args)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_oracle(name: str) -> None:
    case, model, x, method = prepared(name)
    expected = explain(model, x, case.low, case.high, TARGETS, args=case.args)
    actual = method.attribute(x, torch.tensor(TARGETS), case.args)
    assert isinstance(actual, tuple) == isinstance(x, tuple)
    for a, e in zip(every(actual), every(expected), strict=True):
        assert a.dtype == torch.float64
        assert_agrees(a, e)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_explained_is_the_models_own_output(name: str) -> None:
    """Relevance and delta, or the ledger's losses, add up to model(x), and relevance has the logit's sign."""
    case, model, _, method = prepared(name)
    x = case.inputs(3, seed=7)
    logits = outputs(model, case, x)[range(3), TARGETS]
    targets = torch.tensor(TARGETS)
    relevance, delta = method.attribute(x, targets, case.args, return_convergence_delta=True)
    assert torch.allclose(total(relevance) + delta, logits, rtol=0, atol=1e-12 * logits.abs().max().item())
    ledger = method.ledger(x, targets, case.args)
    lost = sum(row.lost for row in ledger.rows)
    assert torch.allclose(lost, delta, rtol=0, atol=1e-12 * logits.abs().max().item())
    for row in ledger.rows:
        assert torch.allclose(row.arriving - row.leaving, row.lost, rtol=0, atol=1e-12 * logits.abs().max().item())
    for r in every(relevance):
        signed = r * logits.sign().reshape(-1, *[1] * (r.dim() - 1))
        assert signed.min() >= -1e-6 * r.abs().max()


@pytest.mark.parametrize("name", LOSSLESS)
def test_conserves(name: str) -> None:
    """No unit of these nets is kept alive by its bias alone, so nothing is lost."""
    case, model, x, method = prepared(name)
    logits = outputs(model, case, x)[range(3), TARGETS]
    assert (total(method.attribute(x, torch.tensor(TARGETS), case.args)) / logits - 1).abs().max() <= 1e-10
    args = tuple(a.float() if isinstance(a, Tensor) else a for a in case.args)
    method = DeepTaylor(case.model(dtype=torch.float32), case.low, case.high)
    narrow = total(method.attribute(case.inputs(3, dtype=torch.float32), torch.tensor(TARGETS), args))
    assert (narrow / logits - 1).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["gated", "rearranged", "slow-fast"])
def test_linear_in_the_seed(name: str) -> None:
    case, model, x, method = prepared(name)
    logits = outputs(model, case, x)[range(3), TARGETS]
    one = run(case, model, x, seed="one")
    assert_agrees(one * logits.reshape(-1, *[1] * (x.dim() - 1)), method.attribute(x, torch.tensor(TARGETS)), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_examples(name: str) -> None:
    """Also in batches of another size than the first, and in parts of `internal_batch_size`."""
    case, _, x, method = prepared(name)
    together = every(method.attribute(x, torch.tensor(TARGETS), case.args))
    for n in range(3):
        one = tuple(v[n : n + 1] for v in every(x))
        args = tuple(a[n : n + 1] if isinstance(a, Tensor) else a for a in case.args)
        alone = method.attribute(one if isinstance(x, tuple) else one[0], TARGETS[n], args)
        for a, b in zip(every(alone), together, strict=True):
            assert_agrees(a, b[n : n + 1], 1e-12)
    parted = method.attribute(x, torch.tensor(TARGETS), case.args, internal_batch_size=2)
    for a, b in zip(every(parted), together, strict=True):
        assert_agrees(a, b, 1e-12)


def test_shapes_may_change_between_calls() -> None:
    case = zoo("residual")
    model = case.model()
    method = DeepTaylor(model, case.low, case.high)
    for shape in ((2, 3, 4, 6, 6), (1, 3, 1, 5, 7), (3, 3, 2, 4, 4), (2, 3, 4, 6, 6)):
        x = between(case.low, case.high, shape, 3)
        assert_agrees(method.attribute(x, 1), explain(model, x, case.low, case.high, 1))


@pytest.mark.parametrize(("limit", "is_free"), [(65_535, True), (100, False)])
def test_a_librarys_limit_to_the_batch_is_not_the_models(limit: int, is_free: bool) -> None:
    """On a GPU tracing a batch norm finds that cuDNN takes at most 65,535 examples; frozen clips are batched all the same."""

    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] <= limit)
            return self.layer(x).mean((2, 3, 4))

    assert trace(Limited().eval(), [torch.rand(1, 3, 2, 2, 2)], 1).any_batch is is_free


def test_an_empty_batch_has_an_empty_explanation() -> None:
    _, _, x, method = prepared("slow-fast")
    assert method.attribute(x[:0], 1).shape == x[:0].shape


def test_flips_commute() -> None:
    """A net with its kernels mirrored in W sees a mirrored clip as the net sees the clip, and explains it mirrored."""
    layers = [
        nn.Conv3d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(3, (1, 2, 2), 1),
        nn.Conv3d(4, 4, (1, 3, 3)),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        model[-1].weight.abs_()
    mirrored = copy.deepcopy(model)
    for module in mirrored.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.flip(-1)
    x = between(-1, 2, (2, 3, 3, 7, 9), 4)
    relevance = DeepTaylor(model, -1, 2).attribute(x, 1)
    assert_agrees(DeepTaylor(mirrored, -1, 2).attribute(x.flip(-1), 1).flip(-1), relevance, 1e-12)
    assert not torch.allclose(relevance, relevance.flip(-1))


# ----------------------------------------------------------------------------------------- final softmax, refusals


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.LogSoftmax(dim=-1)])
def test_a_final_softmax_is_stepped_over_and_says_so(last: nn.Module) -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(3)
    method = DeepTaylor(nn.Sequential(model, last).eval(), case.low, case.high)
    with pytest.warns(UserWarning, match="softmax") as caught:
        relevance = method.attribute(x, torch.tensor(TARGETS))
    assert len(caught) == 1
    assert_agrees(relevance, run(case, model, x), 1e-12)


def test_refuses_what_no_layer_covers_and_names_all_of_it() -> None:
    model = Refused().double().eval()
    x = between(-1, 1, (2, 3, 4, 6, 6), 1)
    with pytest.raises(UnsupportedOperationError) as caught:
        DeepTaylor(model, -1, 1).attribute(x, 0)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for operation in ("log_sigmoid", "exp", "softmax", "mul"):
        assert operation in message
    assert "block.1" in message
    source, start = inspect.getsourcelines(Refused.forward)
    expected = {start + n for n, line in enumerate(source) if "# refused" in line}
    named = {int(line) for line in re.findall(r"models\.py\D{1,20}(\d+)", message)}
    assert expected <= named


@pytest.mark.parametrize(
    "product",
    [lambda a, b: a * b, lambda a, b: a * b.mean((2, 3, 4), keepdim=True), lambda a, b: a / (b + 1), torch.minimum],
)
def test_refuses_products_without_a_gate(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(3, 4, 3), nn.Conv3d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return product(F.relu(self.a(x)), F.relu(self.b(x))).mean((2, 3, 4))

    with pytest.raises(UnsupportedOperationError):
        DeepTaylor(Net().eval(), -1, 1).attribute(between(-1, 1, (2, 3, 4, 6, 6), 1, torch.float32), 0)


def test_refuses_a_net_without_a_pixel_layer() -> None:
    model = nn.Sequential(nn.MaxPool3d(2), nn.Flatten(), nn.Linear(3 * 2 * 3 * 3, 5)).eval()
    with pytest.raises(ValueError, match=r"(?i)pixel|no convolution"):
        DeepTaylor(model, -1, 1).attribute(between(-1, 1, (2, 3, 4, 6, 6), 1, torch.float32), 0)


@pytest.mark.parametrize("part", ["model", "norm", "dropout"])
def test_training_mode_is_an_error(part: str) -> None:
    case = zoo("reused" if part == "norm" else "plain")
    model = case.model()
    {"model": model, "norm": getattr(model, "norm", None), "dropout": getattr(model, "drop", None)}[part].train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        DeepTaylor(model, case.low, case.high).attribute(case.inputs(2), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_inputs_that_are_no_numbers(value: float) -> None:
    case = zoo("plain")
    x = case.inputs(2)
    x[1, 2, 3, 4, 5] = value
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        DeepTaylor(case.model(), case.low, case.high).attribute(x, 0)


def test_values_outside_the_bounds_are_explained_with_one_warning() -> None:
    case = zoo("plain")
    model, x = case.model(), case.inputs(3) * 3
    with pytest.warns(UserWarning, match=r"bound|low|high") as caught:
        relevance = run(case, model, x)
    assert len(caught) == 1
    assert_agrees(relevance, explain(model, x, case.low, case.high, TARGETS))


def test_values_at_the_bounds_warn_of_nothing() -> None:
    case = zoo("plain")
    x = torch.stack(
        [torch.tensor(b, dtype=torch.float64).reshape(3, 1, 1, 1).expand(case.shape) for b in (case.low, case.high)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepTaylor(case.model(), case.low, case.high).attribute(x, 0)
        DeepTaylor(case.model(dtype=torch.float32), case.low, case.high).attribute(x.float(), 0)


# ------------------------------------------------------------------------------------------------ changed weights


def by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight.flip(0))


def by_data(model: nn.Module) -> None:
    model.a.weight.data.mul_(-1)


def by_new_data(model: nn.Module) -> None:
    model.a.weight.data = model.a.weight.data.flip(1)


def by_new_parameter(model: nn.Module) -> None:
    model.a.weight = nn.Parameter(model.a.weight.detach() * -1)


def by_state_dict(model: nn.Module) -> None:
    model.load_state_dict(zoo("residual").model(seed=5).state_dict())


def by_statistics(model: nn.Module) -> None:
    model.a_norm.running_var.mul_(3)
    model.stem_norm.running_mean.add_(0.3)


def by_new_module(model: nn.Module) -> None:
    model.a = nn.Conv3d(4, 4, 3, padding=1).double().eval()


def by_new_stride(model: nn.Module) -> None:
    model.b.stride = (1, 1, 1)
    model.shortcut[0].stride = (1, 1, 1)


@pytest.mark.parametrize(
    "change",
    [by_copy, by_data, by_new_data, by_new_parameter, by_state_dict, by_statistics, by_new_module, by_new_stride],
)
def test_a_changed_model_is_noticed(change: Callable[[nn.Module], None]) -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(2)
    method = DeepTaylor(model, case.low, case.high)
    before = method.attribute(x, 1)
    change(model)
    after = method.attribute(x, 1)
    assert_agrees(after, explain(model, x, case.low, case.high, 1))
    assert not torch.allclose(before, after, rtol=1e-3)


def test_a_model_moved_to_another_dtype_is_noticed() -> None:
    case = zoo("residual")
    model = case.model(dtype=torch.float32)
    method = DeepTaylor(model, case.low, case.high)
    narrow = method.attribute(case.inputs(2, dtype=torch.float32), 1)
    model.double()
    wide = method.attribute(case.inputs(2), 1)
    assert narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert_agrees(narrow, wide, 1e-4)


# ------------------------------------------------------------------------------------- dtypes, wrappers, threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "residual", "gated"])
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    """Finite, and near what the same weights give in float64."""
    case = zoo(name)
    model = case.model().to(dtype)
    x = between(-1.5, 1.5, (2, *case.shape), 1).to(dtype)
    relevance = DeepTaylor(model, case.low, case.high).attribute(x, 0)
    assert relevance.isfinite().all()
    assert_agrees(relevance.double(), explain(copy.deepcopy(model), x, case.low, case.high, 0), 0.1)


def test_half_precision_does_not_overflow_where_a_denominator_is_tiny() -> None:
    model = nn.Sequential(
        nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()
    with torch.no_grad():
        model[2].weight.mul_(1e-7)
        model[2].bias.fill_(1.0)
    x = between(-1, 1, (1, 1, 2, 2, 2), 1, torch.float16)
    assert DeepTaylor(model.half(), -1, 1).attribute(x, 0).isfinite().all()


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(3)
    expected = run(case, model, x)
    assert_agrees(run(case, wrap(model), x), expected, 1e-12)
    override = {"head": Epsilon()}
    assert_agrees(run(case, wrap(model), x, composite=override), run(case, model, x, composite=override), 1e-12)


def test_a_model_in_data_parallel_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(3)
    expected, override = run(case, model, x), {"head": Epsilon()}
    overridden = run(case, model, x, composite=override)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_agrees(run(case, wrapped, x), expected, 1e-12)
        assert_agrees(run(case, wrapped, x, composite=override), overridden, 1e-12)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared", ["method", "model"])
def test_two_threads_at_once(shared: str) -> None:
    """One method object, or one model under two, first calls included; other threads may run the model meanwhile."""
    case = zoo("gated")
    model, x = case.model(), case.inputs(3)
    expected, logits = run(case, model, x), outputs(model, case, x)
    methods = [DeepTaylor(model, case.low, case.high) for _ in range(2)]
    if shared == "method":
        methods[1] = methods[0]
    found: list[Tensor | BaseException] = []
    start = threading.Barrier(3)

    def work(method: DeepTaylor) -> None:
        start.wait()
        try:
            found.extend(method.attribute(x, torch.tensor(TARGETS)) for _ in range(3))
        except BaseException as error:
            found.append(error)

    def use() -> None:
        start.wait()
        try:
            for _ in range(50):
                y = outputs(model, case, x)
                assert type(y) is Tensor
                assert torch.equal(y, logits)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(method,)) for method in methods] + [threading.Thread(target=use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [one for one in found if not isinstance(one, Tensor)]
    assert not errors, errors
    assert len(found) == 6
    for relevance in found:
        assert_agrees(relevance, expected, 1e-12)


# -------------------------------------------------------------------------------------------------- left as found


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return {
        "state": {k: (v, v.data_ptr(), v._version, v.clone()) for k, v in model.state_dict().items()},
        "identity": [id(p) for p in (*model.parameters(), *model.buffers())],
        "training": [m.training for m in model.modules()],
        "modules": [(name, id(m), sorted(m.__dict__)) for name, m in model.named_modules()],
        "hooks": [[list(getattr(m, h)) for h in hooks] for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    for key, (_, pointer, version, value) in before["state"].items():
        tensor, pointer_now, version_now, _ = after["state"][key]
        assert (pointer, version) == (pointer_now, version_now), key
        assert torch.equal(tensor, value), key
    for what in ("identity", "training", "modules", "hooks", "requires_grad", "grad"):
        assert before[what] == after[what], what


def test_model_and_input_are_left_as_found() -> None:
    case = zoo("residual")
    model = case.model()
    model.a.weight.requires_grad_(False)
    fired: list[str] = []
    for module in (model, model.a):
        module.register_forward_hook(lambda *_: fired.append("forward"))
        module.register_forward_pre_hook(lambda *_: fired.append("pre"))
        module.register_full_backward_hook(lambda *_: fired.append("backward"))
    before = snapshot(model)
    x = case.inputs(2).requires_grad_()
    copied = x.detach().clone()
    relevance = DeepTaylor(model, case.low, case.high).attribute(x, 1)
    assert_untouched(before, snapshot(model))
    assert fired == []
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(x, copied)
    assert torch.is_grad_enabled()
    assert not relevance.requires_grad
    relevance.add_(1).requires_grad_()


@pytest.mark.parametrize("mistake", ["unsupported", "target", "nan", "training", "shape"])
def test_left_as_found_after_an_exception(mistake: str) -> None:
    case = zoo("residual")
    model = Refused().double().eval() if mistake == "unsupported" else case.model()
    if mistake == "training":
        model.train()
    x = case.inputs(2)
    if mistake == "nan":
        x[0, 0, 0, 0, 0] = float("nan")
    if mistake == "shape":
        x = x[:, :2]
    x.requires_grad_()
    before, copied = snapshot(model), x.detach().clone()
    with pytest.raises((ValueError, IndexError)):
        DeepTaylor(model, case.low, case.high).attribute(x, 99 if mistake == "target" else 0)
    assert_untouched(before, snapshot(model))
    assert x.requires_grad
    assert torch.equal(x.detach().nan_to_num(), copied.nan_to_num())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_inside_other_modes(mode: Callable[[], Any]) -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(3)
    expected = run(case, model, x)
    with mode():
        actual = run(case, model, x)
    assert_agrees(actual, expected, 1e-12)


# ---------------------------------------------------------------------------------------- rule table and ledger


def test_rule_table_and_ledger_print() -> None:
    case = zoo("norms")
    model, x = case.model(), case.inputs(2)
    method = DeepTaylor(model, case.low, case.high)
    table, ledger = method.rule_table(x), method.ledger(x, 1)
    for text in (str(table), str(ledger)):
        for module in ("a", "b", "c", "fc", "head"):
            assert re.search(rf"\b{module}\b", text)
        assert "ZBeta" in text
        assert "ZPlus" in text
    assert [row.module for row in table.rows if "ZBeta" in str(row.rule)] == ["a"]
    assert all(row.name and row.operation for row in table.rows)
    for row in ledger.rows:
        assert row.arriving.shape == row.leaving.shape == row.lost.shape == (2,)
    assert len({row.name for row in table.rows}) == len(table.rows)


def test_ledger_names_the_layer_that_lost_relevance() -> None:
    """Negative weights after ReLU: the units live by their biases, and all that reaches them is lost there."""
    model = nn.Sequential(
        nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Conv3d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    with torch.no_grad():
        model[2].weight.copy_(-model[2].weight.abs() * 1e-3)
        model[2].bias.fill_(1.0)
    method = DeepTaylor(model.eval(), -1, 1)
    x = between(-1, 1, (2, 3, 2, 2, 2), 1)
    ledger = method.ledger(x, 0)
    worst = max(ledger.rows, key=lambda row: row.lost.abs().sum().item())
    logits = model(x)[:, 0].detach()
    assert torch.allclose(worst.lost, logits)
    assert worst.leaving.abs().max() == 0
    table = {row.name: row.module for row in method.rule_table(x).rows}
    assert table[worst.name] == "2"
