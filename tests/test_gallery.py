"""Pictures of masks show the masks that a model really reads."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import dynmask
from dynmask.evals.gallery import (
    MaskPicture,
    card_pictures,
    mask_gallery,
    picture_of,
    record_masks,
)
from dynmask.nn import PairScore
from dynmask.policies import Retained, Streaming
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent
IDS = torch.randint(3, 256, (1, 60), generator=torch.Generator().manual_seed(2))


def taught(model):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        modules = [PairScore(2, 16, 8) for _ in range(model.config.num_hidden_layers)]
        for module in modules:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
    return Retained(tuple(modules), width=9, window=3, sinks=1)


@torch.no_grad()
@pytest.mark.parametrize("make", [taught, lambda model: Streaming(sinks=2, window=5)])
def test_a_policy_that_evicts_is_drawn_as_it_reads(make, monkeypatch):
    model = TINY["llama"]()
    policy = make(model)
    read = []
    with dynmask.sparsify(model, policy) as run:
        monkeypatch.setattr(run, "_note", lambda site, phase, query, mask, bias: read.append(mask))
        expected = model(IDS, use_cache=False).logits
    pictures, drawn = record_masks(model, IDS, policy, measure_rows=8, resolution=60)
    assert [picture.layer for picture in pictures] == [0, 1]
    for picture, mask in zip(pictures, read, strict=True):
        torch.testing.assert_close(picture.share, picture_of(mask, 0, 60).share, equal_nan=True)
    _, plain = record_masks(model, IDS, policy, measure_rows=8, draw=False)
    assert drawn["prefill"] == plain["prefill"]
    with dynmask.sparsify(model, policy):
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_a_card_whose_masks_depend_on_the_prompt_is_not_drawn_alone():
    card = dynmask.MaskCard.from_pretrained(ROOT / "models" / "dynmask-reference-retained")
    with pytest.raises(ValueError, match="--policy retained:CARD"):
        card_pictures(card, 2048)


@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (1, 6), (3, 2)])
def test_every_panel_is_drawn(tmp_path, heads, layers):
    share = torch.rand(heads, 8, 8)
    masks = [MaskPicture(i, share, share.mean((1, 2)), 8) for i in range(layers)]
    path = mask_gallery(masks, tmp_path / "masks.png", title="t", caption="c")
    assert path.stat().st_size > 5_000
