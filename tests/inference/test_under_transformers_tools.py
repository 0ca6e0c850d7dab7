"""The exported model in the hands of others' tools: caches, beams, compilation, adapters, Trainer, several devices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from tests.inference.test_modeling_dsmoe import VARIANTS, build, token_ids

MOA, GATED = VARIANTS["gelu_linear_moa"], VARIANTS["swiglu_mlp_router_layernorm_tied"]


@pytest.fixture(params=["gelu_linear_moa", "swiglu_mlp_router_layernorm_tied"])
def model(request: pytest.FixtureRequest) -> DSMoEForCausalLM:
    return build(VARIANTS[request.param], torch.float32)[0]


def generated(model: DSMoEForCausalLM, **options: Any) -> Tensor:
    result = model.generate(token_ids(), max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("policy", ["dense", "topk", "threshold"])
def test_a_static_cache_and_beams_give_what_full_passes_give(model: DSMoEForCausalLM, policy: Any) -> None:
    model.set_policy(policy)

    assert torch.equal(generated(model, cache_implementation="static"), generated(model, use_cache=False))
    assert torch.equal(generated(model, num_beams=3), generated(model, num_beams=3, use_cache=False))


@pytest.mark.parametrize("policy", ["dense", "topk"])
def test_decoding_compiles_as_one_graph(model: DSMoEForCausalLM, policy: Any) -> None:
    """With what a compiled program may not ask of its data: the threshold's number of experts is such a thing."""
    model.set_policy(policy)
    ids = token_ids(2, 6)
    expected = model(ids).logits[:, -1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        for position in range(ids.shape[1]):
            logits = compiled(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits

    torch.testing.assert_close(logits[:, -1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("policy", ["dense", "topk", "threshold"])
def test_low_rank_adapters_on_the_experts_take_part_whatever_the_policy(policy: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = build(MOA, torch.float32)
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["k_proj"], target_parameters=["mlp.experts.up_proj", "mlp.experts.down_proj"]),
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.set_policy(policy)
    logits = adapted(token_ids()).logits

    merged: Any = adapted.merge_and_unload()

    merged.set_policy(policy)
    torch.testing.assert_close(logits, merged(token_ids()).logits, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(logits, build(MOA, torch.float32, expert_policy=policy)[0](token_ids()).logits, atol=1e-3)


def test_trainer_trains_it_densely(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = build(MOA, torch.float32)
    model.set_policy("dense")
    ids = token_ids(8, 12)
    samples = [{"input_ids": row, "labels": row} for row in ids]
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip

    Trainer(model=model, args=options, train_dataset=samples).train()

    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < before - 1


def test_a_device_map_places_the_layers(tmp_path: Path) -> None:
    model, _ = build(MOA, torch.float32)
    model.save_pretrained(tmp_path)

    loaded = DSMoEForCausalLM.from_pretrained(tmp_path, device_map="auto")

    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


TENSOR_PARALLEL = """
import sys, torch, torch.distributed as dist
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM

folder, *names = sys.argv[1:]
dist.init_process_group("gloo")
ids = torch.load(f"{folder}/ids.pt", weights_only=True)
for name in names:
    model = DSMoEForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto").eval()
    results = {"units": model.model.layers[0].mlp.experts.down_proj.to_local().shape[-1]}
    for policy in ("dense", "topk", "threshold"):
        model.set_policy(policy)
        with torch.no_grad():
            results[policy] = model(ids).logits
    torch.save(results, f"{folder}/{name}.{dist.get_rank()}.pt")
"""


def test_two_tensor_parallel_processes_give_the_logits_of_one(tmp_path: Path) -> None:
    models = {name: build(VARIANTS[name], torch.float32)[0] for name in ("gelu_linear_moa", "gqa_mlp_experts")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    torch.save(token_ids(), tmp_path / "ids.pt")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path), *models], capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stderr[-3000:]
    for name, model in models.items():
        for rank in range(2):
            results = torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True)
            # half of the units of every expert
            assert results.pop("units") == VARIANTS[name].moe_intermediate_size // 2
            for policy, logits in results.items():
                model.set_policy(policy)
                torch.testing.assert_close(logits, model(token_ids()).logits, rtol=1e-4, atol=2e-5)
