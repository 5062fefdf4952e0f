from __future__ import annotations

import pytest
import torch
from torch import nn

from regrow.app.models import MODELS, build, vision_input_layer


def matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 6)])
def test_every_model_maps_images_to_logits_and_learns(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, 7, seed=0)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lenet_has_its_layers() -> None:
    wanted = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
    assert matrices(build("lenet-300-100", (1, 28, 28), 10)) == wanted


@pytest.mark.parametrize("hidden", [None, (), (5,), (7, 6, 5)])
def test_mlp_takes_any_hidden_widths(hidden: tuple[int, ...] | None) -> None:
    sizes = (12, *((256, 256) if hidden is None else hidden), 3)
    wanted = {f"fc{i}.weight": (sizes[i], sizes[i - 1]) for i in range(1, len(sizes))}
    model = build("mlp", (3, 2, 2), 3, hidden=hidden)
    assert matrices(model) == wanted
    assert sum(isinstance(module, nn.ReLU) for module in model) == len(sizes) - 2


def test_resnet_50_is_that_of_small_images() -> None:
    """The count that the literature gives for CIFAR-100, and a resolution that is halved three times."""
    with torch.device("meta"):
        model = build("resnet-50", (3, 32, 32), 100)
    assert sum(p.numel() for p in model.parameters()) == 23_705_252
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 54
    seen = []
    for name, module in model.named_modules():
        if name in ("group1_block3", "group2_block4", "group3_block6", "group4_block3"):
            module.register_forward_hook(lambda _m, _x, y: seen.append(tuple(y.shape[1:])))
    model(torch.zeros(2, 3, 32, 32, device="meta"))
    assert seen == [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]


def test_convnet_halves_with_each_width_after_the_first() -> None:
    shapes = matrices(build("convnet", (3, 9, 9), 5, hidden=(4, 6, 8)))
    assert shapes == {
        "conv1.weight": (4, 3, 3, 3),
        "conv2.weight": (6, 4, 3, 3),
        "conv3.weight": (8, 6, 3, 3),
        "fc.weight": (5, 8),
    }
    model, seen = build("convnet", (3, 9, 9), 5, hidden=(4, 6, 8)), []
    model.relu3.register_forward_hook(lambda _m, _x, y: seen.append(tuple(y.shape)))
    model(torch.zeros(1, 3, 9, 9))
    assert seen == [(1, 8, 3, 3)]


def test_wide_resnet_is_22_deep_and_2_wide() -> None:
    shapes = matrices(build("wrn-22-2", (3, 32, 32), 10))
    convs = [name for name, shape in shapes.items() if shape[2:] == (3, 3)]
    shortcuts = {name: shape for name, shape in shapes.items() if shape[2:] == (1, 1)}
    assert len(convs) == 19
    assert shapes["stem.weight"] == (16, 3, 3, 3) and shapes["fc.weight"] == (10, 128)
    assert shortcuts == {
        f"body.group{g}_block1.shortcut.weight": (2 ** (4 + g), 2 ** (4 + max(0, g - 1)), 1, 1) for g in (1, 2, 3)
    }
    assert sum(p.numel() for p in build("wrn-22-2", (3, 32, 32), 10).parameters()) == 1_079_642


def test_wide_resnet_halves_the_resolution_twice() -> None:
    seen = []
    model = build("wrn-22-2", (3, 32, 32), 10)
    for name, module in model.named_modules():
        if name.endswith("_block3"):
            module.register_forward_hook(lambda _m, _x, y: seen.append(tuple(y.shape)))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 32, 32, 32), (1, 64, 16, 16), (1, 128, 8, 8)]


def test_a_block_is_pre_activated_and_carries_its_input_unchanged() -> None:
    block = build("wrn-22-2", (3, 8, 8), 10, seed=0).get_submodule("body.group1_block2").eval()
    x = torch.randn(2, 32, 8, 8)
    assert not torch.equal(block(x), x)
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    assert torch.equal(block(x), x)
    changed = build("wrn-22-2", (3, 8, 8), 10, seed=0).get_submodule("body.group2_block1").eval()
    nn.init.zeros_(changed.get_parameter("conv2.weight"))
    activated = nn.functional.relu(changed.get_submodule("bn1")(x))
    assert torch.equal(changed(x), changed.get_submodule("shortcut")(activated))


def test_width_scales_hidden_layers_only() -> None:
    assert matrices(build("mlp", (1, 4, 4), 10, hidden=(100, 3), width=0.29)) == {
        "fc1.weight": (29, 16),
        "fc2.weight": (1, 29),
        "fc3.weight": (10, 1),
    }
    assert matrices(build("lenet-300-100", (1, 28, 28), 10, width=0.5))["fc2.weight"] == (50, 150)
    wide = matrices(build("wrn-22-2", (3, 8, 8), 10, width=0.3))
    assert wide["stem.weight"][:2] == (4, 3) and wide["fc.weight"] == (10, 38)


@pytest.mark.parametrize("name", MODELS)
def test_models_build_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = build(name, (3, 8, 8), 10, seed=0)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert matrices(model) == matrices(build(name, (3, 8, 8), 10))


def test_meta_allocates_nothing() -> None:
    with torch.device("meta"):
        model = build("mlp", (1, 8, 8), 10, hidden=(10**8, 10**8))
    assert matrices(model)["fc2.weight"] == (10**8, 10**8)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_values_and_leaves_the_global_state(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, (1, 8, 8), 10, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = (build(name, (1, 8, 8), 10, seed=seed) for seed in (3, 4))
    pairs = [(a, b, c) for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_without_a_seed_the_global_state_decides() -> None:
    torch.manual_seed(5)
    first, second = (build("mlp", (1, 8, 8), 10) for _ in range(2))
    torch.manual_seed(5)
    again = build("mlp", (1, 8, 8), 10)
    assert torch.equal(first.get_parameter("fc1.weight"), again.get_parameter("fc1.weight"))
    assert not torch.equal(first.get_parameter("fc1.weight"), second.get_parameter("fc1.weight"))


def test_initialisation_is_he() -> None:
    lenet = build("lenet-300-100", (1, 28, 28), 10, seed=0)
    assert lenet.get_parameter("fc1.weight").std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)
    assert not lenet.get_parameter("fc1.bias").any()
    wide = build("wrn-22-2", (3, 32, 32), 10, seed=0)
    for conv in ("conv1", "conv2"):
        weight = wide.get_parameter(f"body.group3_block1.{conv}.weight")
        assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_the_layer_that_reads_pixels() -> None:
    assert vision_input_layer(build("lenet-300-100", (1, 8, 8), 10)) == "fc1"
    assert vision_input_layer(build("wrn-22-2", (3, 8, 8), 10)) is None
    assert vision_input_layer(nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), nn.Linear(2, 2))) == "0.1"
    assert vision_input_layer(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))) is None
    assert vision_input_layer(nn.Linear(4, 2)) == ""
    assert vision_input_layer(nn.ReLU()) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "no model 'resnet': choose mlp, lenet-300-100, convnet, wrn-22-2, resnet-50"),
        ("lenet-300-100", {"hidden": (5,)}, r"\(300, 100\): scale them by width, or take mlp"),
        ("wrn-22-2", {"hidden": (5,)}, "hidden widths"),
        ("mlp", {"hidden": (5, 0)}, r"at least 1, not \(5, 0\)"),
        ("mlp", {"width": 0.0}, "not 0.0"),
        ("mlp", {"width": float("inf")}, "not inf"),
        ("mlp", {"width": float("nan")}, "not nan"),
        ("mlp", {"classes": 0}, r"\(1, 8, 8\) and 0"),
        ("mlp", {"input_shape": (1, 0, 8)}, r"\(1, 0, 8\) and 10"),
        ("mlp", {"input_shape": (8, 8)}, r"\(8, 8\) and 10"),
    ],
)
def test_bad_requests_say_what_there_is(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **{"input_shape": (1, 8, 8), "classes": 10, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
