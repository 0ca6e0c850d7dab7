"""Loading a model's weights: exactly the model's, or a line that names the tensors; never a substitute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM, DSMoEModel

GATE = "model.layers.1.mlp.gate.weight"


def saved(folder: Path, **values: Any) -> DSMoEForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 4, "moe_intermediate_size": 8}
    model = DSMoEForCausalLM(DSMoEConfig(**sizes, **values)).eval()
    model.save_pretrained(folder)
    return model


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(GATE), rf"lacks {GATE}"),
        (lambda tensors: tensors.update(spare=torch.zeros(2)), r"has unknown spare"),
        (lambda tensors: tensors.update({GATE: torch.zeros(7, 16)}), rf"other shapes: {GATE} \(7, 16\), not \(8, 16\)"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.gate.bias": tensors.pop(GATE)[:, 0].clone()}),
            r"lacks .*gate\.weight and has unknown .*gate\.bias",
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), r"lacks lm_head\.weight"),
    ],
    ids=["missing", "extra", "misshapen", "renamed", "no output layer"],
)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["", "mismatches ignored"])
def test_what_is_not_the_models_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], message: str, options: dict[str, Any]
) -> None:
    saved(tmp_path)
    change(tmp_path, edit)

    with pytest.raises(ValueError, match=message) as refusal:
        DSMoEForCausalLM.from_pretrained(tmp_path, **options)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_own_weights_load_with_and_without_output_layer(tmp_path: Path, tied: bool) -> None:
    model = saved(tmp_path, tie_word_embeddings=tied)
    ids = torch.arange(12).view(2, 6)

    whole, base = DSMoEForCausalLM.from_pretrained(tmp_path), DSMoEModel.from_pretrained(tmp_path)

    assert torch.equal(whole(ids).logits, model(ids).logits)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied


def test_tied_weights_need_the_embedding(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    change(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))

    with pytest.raises(ValueError, match=r"lacks .*embed_tokens"):
        DSMoEForCausalLM.from_pretrained(tmp_path)
