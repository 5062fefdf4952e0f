"""Models that the project did not write train sparsely in an ordinary loop, without a changed line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import regrow
from regrow import methods
from regrow.engine.discovery import find

STEPS = 60


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    config.num_labels = 4
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(16, 3, 16, 16),
        "labels": torch.arange(16) % 4,
    }


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = torch.randint(0, 50, (8, 12))
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.num_labels = 4
    return transformers.BertForSequenceClassification(config), {
        "input_ids": torch.randint(0, 50, (16, 12)),
        "labels": torch.arange(16) % 4,
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def weight_entries(model: nn.Module) -> int:
    kinds = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    return sum(p.numel() for p in {m.weight for m in model.modules() if isinstance(m, kinds)})


@pytest.mark.parametrize("make", [vit, gpt2, bert])
def test_foreign_models_train_sparsely(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    model, batch = make()
    keys, entries = list(model.state_dict()), weight_entries(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = regrow.sparsify(model, optimizer, methods.rigl(0.3, until=STEPS * 3 // 4, interval=5))
    start = sparsifier.topologies
    losses = train(model, optimizer, batch)
    assert sparsifier.numel >= 0.9 * entries
    assert sparsifier.updates >= 5
    assert any(t != start[name] for name, t in sparsifier.topologies.items())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert list(model.state_dict()) == keys
    own = dict(model.named_parameters())
    assert sum(int((own[name] != 0).sum()) for name in sparsifier.topologies) <= sparsifier.nnz
    assert sparsifier.nnz == round(0.3 * sparsifier.numel)


ARCHITECTURES = [
    "Bert",
    "ConvNext",
    "DeepseekV3",
    "Electra",
    "GPT2",
    "GptOss",
    "Llama",
    "Mamba",
    "Mamba2",
    "Mixtral",
    "Qwen3",
    "Qwen3Moe",
    "ResNet",
    "Swin",
    "T5",
    "ViT",
    "Wav2Vec2",
    "Whisper",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_of_a_foreign_model_is_accounted_for(name: str) -> None:
    """Sparsified, or listed once with its reason; nearly all weights are sparsified, stacked experts too."""
    few = dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), 2)
    config = getattr(transformers, f"{name}Config")(**few)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    found, excluded = find(model)
    told = [f.name for f in found] + [e.name for e in excluded]
    assert len(set(told)) == len(told)
    # What weight norm computes a weight from is listed as that weight.
    matrices = {n for n, p in model.named_parameters() if sum(size > 1 for size in p.shape) > 1}
    assert {n for n in matrices if ".parametrizations." not in n} <= set(told)
    assert {e.reason.partition(" ")[0] for e in excluded} <= {"embedding", "depthwise", "in", "no", "reparametrized"}
    sparse = sum(f.parameter.numel() for f in found)
    unknown = sum(e.numel for e in excluded if e.reason.startswith("in an unknown"))
    assert unknown < 0.02 * sparse
