"""What is made functional by hand computes what the model computes, and what is not simple is left to torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch.export import export

from captum_dtd import functional, graph
from captum_dtd.canonizers import canonize
from captum_dtd.functional import functionalize, step_over_aliases
from captum_dtd.operations import aten

Body = Callable[["Net", Tensor], Tensor]

ONE = torch.ones(1)
DROPOUT_COPIES = decomposition_table[aten.dropout.default](ONE, 0.5, False) is not ONE
"""Whether torch takes dropout that does nothing for a copy, as before https://github.com/pytorch/pytorch/pull/185981."""


class Net(nn.Module):
    """A convolution, a batch norm and a linear layer, put together by a function."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.other = nn.Conv3d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm3d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(4, 5)
        self.square = nn.Parameter(torch.rand(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, x)
        return self.head(F.dropout(y.mean((2, 3, 4)), 0.5, self.training))


def residual(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y += net.other(x)
    return y.relu_().mul_(2.0)


def scaled_residual(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = y * 3  # before y is changed
    return y.add_(z, alpha=0.5) - z


def written_twice(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(net.conv(x)), inplace=True)
    z = y + 1  # what was written
    y.mul_(0.5)
    return z - F.leaky_relu_(y)


def overwritten_after_dropout(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = F.dropout(y, 0.5, net.training)  # y itself
    w = z * 3  # before it is changed
    y.relu_()
    return w - F.dropout(y, 0.0, True).mul_(0.5)


SIMPLE: dict[str, Body] = {
    "residual": residual,
    "scaled residual": scaled_residual,
    "written twice": written_twice,
    "batch norm": lambda net, x: torch.relu(net.norm(net.conv(x))),
    "dropout": lambda net, x: F.dropout(F.dropout(net.conv(x), 0.5, net.training), 0.3, net.training).relu(),
    "overwritten after dropout": overwritten_after_dropout,
    "flat": lambda net, x: net.conv(x).flatten(2).relu().flatten(-1).view(-1, 4, 4, 6, 6),
    "flat after dropout": lambda net, x: F.dropout(net.conv(x), 0.5, net.training).flatten(1).view(-1, 4, 4, 6, 6),
    "cut and joined": lambda net, x: torch.cat([net.conv(x)[:, :2].relu(), net.other(x).split(2, 1)[1]], 1),
}


def seen_through_a_slice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    part = y[:, :, :2]
    y.relu_()
    return y + part.sum(2, keepdim=True)


def written_through_a_slice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, :, 0].mul_(3)
    return y


def written_through_dropout(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = F.dropout(y, 0.5, net.training)  # y itself
    z.relu_()
    return y - 0.5 * z


def written_under_dropout(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = F.dropout(F.dropout(y, 0.0, True), 0.5, net.training)  # y itself
    y.relu_()
    return y - 0.5 * z.sum(2, keepdim=True) + z[:, :1]


def written_through_dropout_of_a_slice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    F.dropout(y[:, :, 0], 0.5, net.training).mul_(3)
    return y


def written_through_dropout_in_other_modes(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch.enable_grad():
        z = F.dropout(y, 0.5, net.training)  # y itself, in a part of its own
        z.relu_()
    with torch.autocast("cpu", enabled=True):
        w = F.dropout(z, 0.5, net.training)
    w.mul_(2)
    return y - 0.5 * z + w.mean(2, keepdim=True)


def input_overwritten_through_dropout(net: Net, x: Tensor) -> Tensor:
    F.dropout(x, 0.5, net.training).mul_(0.5)
    return net.conv(x)


def buffer_overwritten_through_dropout(net: Net, x: Tensor) -> Tensor:
    F.dropout(net.norm.running_mean, 0.5, net.training).mul_(0.5)
    return net.norm(net.conv(x))


def input_overwritten(net: Net, x: Tensor) -> Tensor:
    x.mul_(0.5)
    return net.conv(x)


def buffer_overwritten(net: Net, x: Tensor) -> Tensor:
    net.norm.running_mean.mul_(0.5)
    return net.norm(net.conv(x))


def rounded_in_place(net: Net, x: Tensor) -> Tensor:
    y = (net.conv(x) * 8).half() * 1
    return y.add_(net.other(x)).float()  # the sum stays in half precision


NOT_SIMPLE: dict[str, Body] = {
    "seen through a slice": seen_through_a_slice,
    "written through a slice": written_through_a_slice,
    "written through dropout of a slice": written_through_dropout_of_a_slice,
    "written through dropout in other modes": written_through_dropout_in_other_modes,
    "input overwritten through dropout": input_overwritten_through_dropout,
    "buffer overwritten through dropout": buffer_overwritten_through_dropout,
    "input overwritten": input_overwritten,
    "flat and overwritten": lambda net, x: net.conv(x).flatten(2).relu_().view(-1, 4, 4, 6, 6),
    "buffer overwritten": buffer_overwritten,
    "rounded in place": rounded_in_place,
    "statistics of the batch": lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
    "dropout at random": lambda net, x: F.dropout(net.conv(x), 1.0, True),
    "batch made flat": lambda net, x: net.conv(x).flatten(0, 1).view(-1, 4, 4, 6, 6),
}

# Where dropout copies for torch, export records two tensors, of which one is read after the other was written over.
(NOT_SIMPLE if DROPOUT_COPIES else SIMPLE).update(
    {"written through dropout": written_through_dropout, "written under dropout": written_under_dropout}
)


def computed(net: nn.Module, x: Tensor) -> Tensor:
    """The traced graph, run on the model's tensors."""
    traced = graph.trace(net, [x], len(x))
    of_input = dict(zip(traced.inputs, [x], strict=True))
    arguments = [
        traced.constants[node]
        if node in traced.constants
        else of_input[node]
        if node in of_input
        else graph.tensor_of(net, traced.tensors[node])
        for node in traced.graph.nodes
        if node.op == "placeholder"
    ]
    (output,) = fx.Interpreter(fx.GraphModule(nn.Module(), traced.graph)).run(*arguments)
    return output  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name in SIMPLE | NOT_SIMPLE if name != "dropout at random"])
def test_a_graph_computes_what_the_model_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (SIMPLE | NOT_SIMPLE)[name]
    net, x = Net(body).eval(), torch.rand(2, 3, 4, 6, 6)
    asked: list[bool] = []
    monkeypatch.setattr(graph, "functionalize", lambda g: asked.append(functionalize(g)) or asked[-1])
    with torch.no_grad():
        found = computed(net, x.clone())
        assert asked == [name in SIMPLE]
        expected = net(x.clone())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["simple", "not simple"])
def test_dropout_may_come_last(name: str) -> None:
    """Then the graph returns what dropout was given."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if name == "not simple":
                x[:, :1].mul_(0.5)
            return F.dropout(x.flatten(1).relu(), 0.5, self.training)

    net, x = Last().eval(), torch.rand(2, 3, 4, 6, 6) - 0.5
    torch.testing.assert_close(computed(net, x.clone()), net(x.clone()), rtol=0, atol=0)


def recorded_graph(body: Body) -> fx.Graph:
    program = export(Net(body).eval(), (torch.rand(2, 3, 4, 6, 6),))
    step_over_aliases(program.graph_module)
    return program.graph


def test_only_dropout_that_does_nothing_is_stepped_over() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = F.dropout(F.dropout(F.dropout(net.conv(x), 0.0, True), 1.0, False), 1.0, True)
        with torch.no_grad():
            return F.dropout(F.dropout(y, 0.5, False), 0.25, True)

    program = export(Net(body).eval(), (torch.rand(2, 3, 4, 6, 6),))
    step_over_aliases(program.graph_module)
    parts = [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    assert len(parts) > 1  # what is computed without gradients is a part of its own
    left = [node.args[1:] for part in parts for node in part.graph.nodes if node.target is aten.dropout.default]
    assert left == [(1.0, True), (0.25, True)]
    assert all(part.code.count("dropout.default(") == 1 for part in parts)


@pytest.mark.parametrize("name", SIMPLE)
def test_nothing_is_left_that_writes(name: str) -> None:
    recorded = recorded_graph(SIMPLE[name])
    assert functionalize(recorded)
    recorded.lint()
    left = {node.target for node in recorded.nodes if node.op == "call_function"}
    assert not any(target._schema.is_mutable for target in left if isinstance(target, torch._ops.OpOverload))
    assert left <= functional._NEW | functional._VIEWS | {functional.batch_norm}


@pytest.mark.parametrize("name", NOT_SIMPLE)
def test_what_is_not_simple_is_left_as_it_is(name: str) -> None:
    recorded = recorded_graph(NOT_SIMPLE[name])
    before = str(recorded)
    if functionalize(recorded):
        assert name == "batch made flat"  # which is simple where the batch is fixed
    else:
        assert str(recorded) == before


def everything(net: Net, x: Tensor) -> Tensor:
    """Every operation that is said to stay as it is."""
    y = net.conv(x) + net.other(x)
    y = (
        F.leaky_relu(F.elu(torch.sub(y, 0.1))) * torch.sigmoid(y)
        + F.silu(y) / 2
        + F.gelu(y)
        + F.relu(y)
        + F.hardtanh(y).tanh()
    )
    y = F.rms_norm(F.layer_norm(F.instance_norm(F.group_norm(y, 2)), (6,)), (6,))
    y = F.avg_pool3d(F.max_pool3d(y, 1), 1).permute(0, 1, 2, 4, 3).transpose(3, 4)
    planes = y[:, :, 0]  # (N, 4, 6, 6)
    planes = F.conv2d(F.conv2d(planes, net.square), net.square, padding="valid")
    planes = F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(planes, 1), 1), 4)
    lines = F.conv1d(F.conv1d(planes[..., 0], net.square[..., 0]), net.square[..., 0], padding="same")
    lines = F.adaptive_avg_pool1d(F.avg_pool1d(F.max_pool1d(lines, 1), 1), 2)
    lines = F.scaled_dot_product_attention(lines, lines, torch.bmm(lines, lines.transpose(1, 2)) @ lines)
    first, second = torch.stack([lines, lines]).sum(0).softmax(1).split(1, 2)
    joined = torch.cat([first.squeeze(2), second.squeeze((2,))], 1).unsqueeze(1)[:, :, :4].view(-1, 4, 1, 1, 1)
    return F.adaptive_avg_pool3d(y, 2) + joined


def without_copies_for_dropout(g: fx.Graph) -> fx.Graph:
    for node in g.find_nodes(op="call_function", target=aten.clone.default):
        if node.meta["from_node"][-1].target == str(aten.dropout.default):
            node.replace_all_uses_with(node.all_input_nodes[0])
            g.erase_node(node)
    return g


def operations(g: fx.Graph) -> list[Any]:
    """What is left to relevance of a graph, in order."""
    given = g.find_nodes(op="placeholder")
    canonize(g, given, given)
    return [node.target for node in g.nodes if node.op == "call_function" and node.target is not aten.sym_size.int]


@pytest.mark.parametrize("name", ["everything", *SIMPLE])
def test_a_graph_is_that_of_exports_own_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(SIMPLE.get(name, everything)).eval(), torch.rand(2, 3, 4, 6, 6)
    ours = graph.trace(net, [x], 2).graph
    if name == "everything":
        found = {node.target for node in ours.nodes if node.op == "call_function"}
        assert (functional._NEW | functional._VIEWS) - {aten.sym_size.int} <= found
    monkeypatch.setattr(graph, "functionalize", lambda _: False)
    monkeypatch.setattr(graph, "step_over_aliases", lambda _: None)
    theirs = graph.trace(net, [x], 2).graph
    if DROPOUT_COPIES:
        theirs = without_copies_for_dropout(theirs)
    assert operations(ours) == operations(theirs)
