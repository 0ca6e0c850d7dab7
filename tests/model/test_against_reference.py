"""The model on megatron-core against the paper's equations in float64: logits, losses and every gradient."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_megatron.config import Config
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from tests.reference_model import ReferenceConfig, reference_forward, reference_loss
from tests.training_jobs import run_layout, text_batch, tiny_config
from tests.worker_pool import WorkerPool

SWIGLU = {"hidden_act": "silu", "gated_mlp": True}
MLP_ROUTER = {"router_type": "mlp"}
GQA = {"attention_type": "gqa"}
MODELS: dict[str, dict[str, Any]] = {
    "gelu linear moa": {},
    "gelu mlp moa": MLP_ROUTER,
    "gelu linear gqa": GQA,
    "gelu mlp gqa": {**MLP_ROUTER, **GQA},
    "swiglu linear moa": SWIGLU,
    "swiglu mlp moa": {**SWIGLU, **MLP_ROUTER},
    "swiglu linear gqa": {**SWIGLU, **GQA},
    "swiglu mlp gqa": {**SWIGLU, **MLP_ROUTER, **GQA},
    "tied, layernorm, padded vocabulary": {"tie_word_embeddings": True, "norm_type": "layernorm", "vocab_size": 230},
    "dense baseline": {"num_experts": 1, "moe_intermediate_size": 96, **GQA},
}
TOLERANCE = 1e-5  # of the largest value of a tensor; the model computes in float32


def reference_config(config: Config) -> ReferenceConfig:
    names = {field.name for field in fields(ReferenceConfig)}
    values = {name: value for name, value in vars(config.model).items() if name in names}
    return ReferenceConfig(**values, rope_theta=config.model.rope_parameters.rope_theta)


def exported(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert config.model.vocab_size is not None
    mapping = TensorMapping(config.model, config.model.vocab_size, config.model.padded_vocab_size)
    return mapping.to_exported(tensors)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_every_gradient(worker_pool: WorkerPool, name: str) -> None:
    config = tiny_config(MODELS[name])
    reference = reference_config(config)
    trace = run_layout(worker_pool, config, world_size=1, steps=1)
    weights = {key: tensor.double().requires_grad_() for key, tensor in exported(config, trace.initial_weights).items()}
    batch = text_batch(0, config.train.global_batch_size).clamp(max=reference.vocab_size - 1)
    if "padded" in name:
        assert int(text_batch(0, config.train.global_batch_size).max()) < reference.vocab_size

    output = reference_forward(reference, weights, batch[:, :-1])
    assert trace.logits is not None
    assert relative_difference(trace.logits[..., : reference.vocab_size], output.logits) < TOLERANCE
    assert trace.logits[..., reference.vocab_size :].eq(float("-inf")).all()

    # the gradient of a step is the mean over micro-batches, each with mutual-information losses of its own
    parts = batch.split(config.train.micro_batch_size)
    mi_losses: dict[tuple[int, str], float] = {}
    lm_loss = 0.0
    for part in parts:
        (reference_loss(reference, weights, part[:, :-1], part[:, 1:]) / len(parts)).backward()
        part_output = reference_forward(reference, weights, part[:, :-1])
        logits, labels = part_output.logits.flatten(0, 1), part[:, 1:].flatten()
        lm_loss += float(torch.nn.functional.cross_entropy(logits, labels).detach()) / len(parts)
        for router, loss in part_output.mi_losses.items():
            mi_losses[router] = mi_losses.get(router, 0.0) + float(loss.detach()) / len(parts)
    assert trace.lm_losses[0] == pytest.approx(lm_loss, rel=TOLERANCE)
    assert trace.mi_losses[0] == pytest.approx(mi_losses, rel=TOLERANCE)

    gradients = exported(config, trace.gradients)
    assert gradients.keys() == weights.keys()
    differences = {}
    for key, weight in weights.items():
        assert weight.grad is not None
        differences[key] = relative_difference(gradients[key], weight.grad)
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] < TOLERANCE, f"gradient of {worst} is off by {differences[worst]:.1e}"
    norm = torch.cat([weight.grad.flatten() for weight in weights.values() if weight.grad is not None]).norm()
    assert trace.grad_norms[0] == pytest.approx(float(norm), rel=TOLERANCE)
