"""Bottom, Trunk and Top on a CUDA device and beside it."""

import pytest
import torch
from language_models import language_model, padded

from torchdistpackage.split.parts import ModelFactory, load_split_model

pytest.importorskip("transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = ["auto", {"bottom": "cuda", "trunk": "cuda", "top": "cuda"}, {"bottom": "cpu", "trunk": "cuda", "top": "cpu"}]


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "Qwen2", "Llama"])
@pytest.mark.parametrize("place", PLACES, ids=["auto", "device", "both"])
def test_parts_move_what_comes_in(family, place, tmp_path):
    whole = language_model(family)
    whole.save_pretrained(tmp_path)
    bottom, trunk, top = ModelFactory.create_split_models("auto", tmp_path, 1, 3, device_map=place)
    ids, mask = padded()
    hidden = trunk(bottom(ids, attention_mask=mask), attention_mask=mask)
    output = top(hidden, attention_mask=mask, labels=ids)
    expected = whole(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(output.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    output.loss.backward()
    assert all(p.grad is not None for part in (bottom, trunk, top) for p in part.parameters())


def test_a_part_is_loaded_onto_a_device(tmp_path):
    language_model("Llama").save_pretrained(tmp_path)
    _, trunk, _ = ModelFactory.create_split_models("llama", tmp_path, 1, 3, device="cuda", parts=["trunk"])
    again = load_split_model(trunk.save_split_model(tmp_path / "trunk"), device="cuda", verify=True)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in trunk.state_dict().items())
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cuda"}
