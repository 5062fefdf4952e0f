"""What parts remember: one owner for each thing, saved under the keys that files already have."""

from __future__ import annotations

import pytest
import torch

from regrow import parts
from regrow.core.method import Parts
from regrow.parts import EXPLORED, LATENT, MOMENTUM, PLACED, Remembered
from support.fakes import Fake

AGE = Remembered("age", "record of ages", "observe=count_ages")


def test_what_is_missing_is_told_with_the_weight_and_the_remedy() -> None:
    weight = Fake([1, 2], None, None, "layer.weight")
    assert not AGE.known(weight)
    with pytest.raises(ValueError, match=r"^layer\.weight has no record of ages: observe=count_ages$"):
        AGE.of(weight)
    with pytest.raises(ValueError, match=r"^this weight has no record of ages"):
        AGE.of(Parts(torch.zeros(2), torch.ones(2, dtype=torch.bool), {}))


def test_it_begins_once_and_is_the_tensor_itself() -> None:
    weight = Fake([1, 2])
    first = AGE.begin(weight, lambda: torch.zeros(1, 2))
    first += 3
    assert AGE.begin(weight, lambda: torch.ones(5)) is first is AGE.of(weight) is weight.state["age"]
    assert AGE.flat(weight).tolist() == [3, 3]
    AGE.set(weight, torch.tensor(7))
    assert AGE.known(weight) and int(AGE.of(weight)) == 7


def test_a_latent_weight_reads_what_it_is_computed_from() -> None:
    held = Parts(torch.zeros(2), torch.ones(2, dtype=torch.bool), {"latent": torch.tensor([4.0, 5])})
    assert LATENT.of(held).tolist() == [4, 5]


def test_saved_keys_stay() -> None:
    """A sparsifier's state dict of an older version goes on to be read."""
    owners = {name: value.key for name, value in vars(parts).items() if isinstance(value, Remembered)}
    assert owners == {
        "MOMENTUM": "momentum",
        "EXPLORED": "explored",
        "PLACED": "placed",
        "DROP_THRESHOLD": "threshold",
        "TARGET": "target",
        "LATENT": "latent",
        "BACKWARD_SET": "backward",
        "MOVEMENT_SCORES": "scores",
        "SOFT_THRESHOLD": "threshold",
        "GATE_LOGITS": "log_alpha",
        "DIAGONAL_LOGITS": "alpha",
        "DIAGONAL_COUNT": "diagonals",
        "TEMPERATURE": "temperature",
        "PATTERN": "pattern",
        "PERMUTATION": "permutation",
        "INPUT_ORDER": "order",
        "SCALE": "scale",
        "LOG_VARIANCE": "log_variance",
    }


@pytest.mark.parametrize(
    ("owner", "remedy"), [(MOMENTUM, "keep_momentum"), (EXPLORED, "EXPLORED"), (PLACED, "EXPLORED")]
)
def test_remedies_name_what_exists(owner: Remembered, remedy: str) -> None:
    assert remedy in owner.remedy
    assert hasattr(parts, remedy)
