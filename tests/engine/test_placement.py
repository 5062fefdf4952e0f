"""What compressed storage refuses, in which words, and that nothing is half-done then."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from regrow import methods, sparsify
from regrow.core.method import Method, Need
from regrow.nn import SparseLinear
from support.pairs import batch, loss_of, model_of, positions
from support.table import METHODS


def rigl() -> Method:
    return methods.rigl(0.5, until=30, interval=3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def require_dense_and_trainable(model: nn.Module, before: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Nothing has happened: the same values, and masked storage can take the model."""
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not positions(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def refused(match: str, model: nn.Module, method: Method, optimizer: Any = None, **options: Any) -> str:
    optimizer = optimizer or sgd(model)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match) as caught:
        sparsify(model, optimizer, method, **{"storage": "compressed", **options})
    require_dense_and_trainable(model, before, optimizer)
    assert [type(module) for module in model.modules()] == classes
    return str(caught.value)


NEEDS = {
    "dense": (methods.dense(), "holds a value at every position during training"),
    "gmp": (METHODS["gmp"](), "holds a value at every position during training"),
    "snfs": (METHODS["snfs"](), "reads the gradient at every position at every step"),
    "snip": (METHODS["snip"](), "starts from a dense model's gradient, unless batches= and loss= are given"),
    "rigl": (rigl()._replace(needs=Need.GRADIENT | Need.EXPLORED), "keeps a record of every position"),
    "set": (METHODS["set"]()._replace(needs=Need.EXPLORED | Need.EVERY_GRADIENT), "reads .* and keeps a record"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_would_be_dense_is_refused_with_layer_and_bytes_unless_it_is_allowed(name: str):
    method, reason = NEEDS[name]
    model = model_of("linear", torch.float32)
    match = rf"^{name} {reason}.*: 0\.weight alone takes 1,152 bytes dense; pass allow_dense=True"
    refused(match, model, method)
    sparsifier = sparsify(model, sgd(model), method, storage="compressed", allow_dense=True)
    assert set(positions(model)) == set(sparsifier.topologies)


def test_snip_from_batches_needs_no_permission():
    model = model_of("linear")
    sparsifier = sparsify(
        model, sgd(model), methods.snip(0.2), storage="compressed", batches=[batch("linear", 1)], loss=loss_of
    )
    assert sparsifier.nnz == model[0].weight.numel() + model[2].weight.numel() == round(0.2 * (12 * 24 + 24 * 5))


def parts_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() != 2]


class Own(torch.optim.LBFGS):
    """A refused optimizer under another name."""


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters()),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "Muon": lambda model: [torch.optim.Muon(parts_of(model)[0]), torch.optim.SGD(parts_of(model)[1], lr=0.1)],
    "Own": lambda model: Own(model.parameters()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_are_not_element_wise_are_refused_by_name(name: str):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = model_of("linear")
    optimizers = REFUSED[name](model)
    first = optimizers[0] if isinstance(optimizers, list) else optimizers
    with pytest.raises(ValueError, match=rf"^{name} cannot step 0\.weight compressed.*element-wise"):
        sparsify(model, optimizers, rigl(), storage="compressed")
    assert not positions(model) and not first._optimizer_step_pre_hooks


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what its class does."""


def called_otherwise() -> nn.Module:
    module = nn.Linear(6, 6)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


NO_FORM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no class of its own": (lambda: nn.RNNCellBase(6, 6, True, 3), "RNNCellBase"),
    "own forward": (lambda: Doubled(6, 6), "Doubled"),
    "patched forward": (called_otherwise, "Linear"),
    "another weight computed": (lambda: parametrizations.weight_norm(nn.Linear(6, 6), "bias", dim=None), r"\w*Linear"),
}


@pytest.mark.parametrize("case", NO_FORM)
def test_a_module_without_sparse_form_is_named_and_may_be_skipped(case: str):
    make, kind = NO_FORM[case]
    model = nn.Sequential(nn.Linear(6, 6), make())
    refused(rf"^1\.\S*weight\S* belongs to a {kind}, of which there is no sparse form: name it in skip=", model, rigl())
    sparsify(model, sgd(model), rigl(), storage="compressed", skip="1")
    assert list(positions(model)) == ["0.weight"]


def test_a_subclass_that_computes_what_its_class_does_becomes_sparse_and_dense_again():
    model = nn.Sequential(Named(6, 6))
    sparsify(model, sgd(model), rigl(), storage="compressed")
    assert isinstance(model[0], SparseLinear)
    assert type(model[0].to_dense()) is Named


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "storage": ({"storage": "sparse"}, r"storage must be one of .*masked.*compressed.*sparse"),
    "init": ({"init": "fanin"}, r"init must be one of .*module.*fan_in.*fanin"),
    "budget": ({"budget": "all"}, r"budget must be one of .*all"),
    "skip": ({"skip": "no such"}, "no such"),
    "batches": ({"batches": [1]}, "batches= and loss= belong together"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words(case: str):
    options, match = WRONG[case]
    model = model_of("linear")
    with pytest.raises(ValueError) as caught:
        sparsify(model, sgd(model), rigl(), **{"storage": "compressed", **options})
    assert re.search(match, str(caught.value).replace('"', ""))
    assert not positions(model)


@pytest.mark.parametrize("net", ["linear", "conv", "gru", "attention"])
def test_while_a_graph_is_alive_nothing_becomes_sparse(net: str):
    """Afterwards, once it is let go, everything does."""
    model = model_of(net)
    optimizer = sgd(model)
    loss = loss_of(model, batch(net, 1))
    refused(
        "cannot become compressed while something else refers to it.*before the first forward", model, rigl(), optimizer
    )
    loss.backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    del loss
    sparsifier = sparsify(model, optimizer, rigl(), storage="compressed")
    for name, at in positions(model).items():
        assert torch.equal(model.get_parameter(name).detach(), before[name].reshape(-1)[at])
    loss_of(model, batch(net, 1)).backward()
    optimizer.step()
    assert sparsifier.step == 1


def test_a_graph_of_the_last_weight_alone_is_enough():
    """The weights before it are found free first, and must not have become sparse by then."""
    model = model_of("linear")
    held = model[2].weight.sum()
    refused(r"^2\.weight cannot become compressed", model, rigl())
    del held


def test_gradients_and_state_of_dense_training_are_taken_over():
    model = model_of("linear")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch("linear", step)).backward()
        optimizer.step()
    weight = model[0].weight
    dense = {"grad": weight.grad.clone(), **{k: v.clone() for k, v in optimizer.state[weight].items()}}
    sparsify(model, optimizer, rigl(), storage="compressed")
    at = positions(model)["0.weight"]
    found = {"grad": weight.grad, **optimizer.state[weight]}
    for key, tensor in dense.items():
        assert torch.equal(found[key], tensor.view(-1)[at] if tensor.dim() else tensor), key


def test_a_model_that_is_already_sparse_says_so():
    model = model_of("linear")
    optimizer = sgd(model)
    sparsify(model, optimizer, rigl(), storage="compressed").remove()
    with pytest.raises(ValueError, match=r"nothing to sparsify.*already sparse"):
        sparsify(model, optimizer, rigl(), storage="compressed")


def test_an_update_that_keeps_too_much_states_the_bytes():
    model = model_of("linear", torch.float32)
    optimizer = sgd(model)
    sparsify(model, optimizer, methods.rigl(0.5, until=9, interval=1), storage="compressed", update_memory=1000)
    with pytest.raises(RuntimeError, match=r"at least 1,392 bytes .* the limit of 1,000: raise update_memory=.*batch"):
        loss_of(model, batch("linear", 1, torch.float32)).backward()


def test_masked_storage_ignores_nothing_that_is_for_compressed_storage():
    """It accepts what changes nothing there: it is dense, and keeps no operands."""
    model = model_of("linear")
    sparsifier = sparsify(model, sgd(model), METHODS["gmp"](), allow_dense=False)
    assert sparsifier.nnz == sparsifier.numel


def test_a_limit_of_compressed_storage_is_refused_in_masked():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="update_memory= limits what"):
        sparsify(model, optimizer, methods.static(0.5), update_memory=1000)


def test_memory_for_updates_must_be_positive():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="update_memory must be 1 byte or more, got -1"):
        sparsify(model, optimizer, methods.static(0.5), storage="compressed", update_memory=-1)


def test_a_meta_buffer_that_nobody_fills_is_named():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("frequencies", torch.ones(3))

        def reset_parameters(self) -> None:
            nn.init.ones_(self.scale)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), Table())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="1 has frequencies on the meta device, which its reset_parameters leaves"):
        sparsify(model, optimizer, methods.static(0.5), storage="compressed")
