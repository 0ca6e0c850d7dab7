"""Upcycling: a dense Llama and the DS-MoE that is made of it compute the same; what cannot be carried is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from checkpoints_tools.import_hf import import_model
from checkpoints_tools.upcycle import Mixture, main, upcycle
from dsmoe_megatron.errors import DSMoEError
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.tokenizers import load_tokenizer, save_huggingface
from tests.pretrain_job import SmallData

SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 48,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def save_dense(folder: Path, tokenizer: str, model: Any = None, **changes: Any) -> Path:
    torch.manual_seed(1)
    dense = model or LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    for name, parameter in dense.named_parameters():
        if "norm" in name:  # norms of one would hide a norm that is left out
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.2)
    dense.save_pretrained(folder)
    save_huggingface(load_tokenizer(tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, small_data: SmallData) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "llama", small_data.tokenizer)


def token_ids() -> Tensor:
    return torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def relative_difference(model: DSMoEForCausalLM, dense: Any) -> float:
    expected = dense.eval()(token_ids()).logits
    return float((model(token_ids()).logits - expected).abs().max() / expected.abs().max())


MIXTURES = {
    "heads and units": Mixture(num_experts=8),
    "no power of two": Mixture(num_experts=9),  # and three attention experts
    "mlp router": Mixture(num_experts=4, router_type="mlp", router_hidden_size=16),
    "units alone": Mixture(num_experts=4, attention_type="gqa"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_computes_what_the_dense_model_computes(dense: Path, tmp_path: Path, name: str) -> None:
    upcycle(dense, tmp_path / "model", MIXTURES[name])

    model = DSMoEForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative_difference(model, LlamaForCausalLM.from_pretrained(dense)) < 1e-5
    mixture = MIXTURES[name]
    expected = {
        "num_experts": mixture.num_experts,
        "moe_intermediate_size": 288 // mixture.num_experts,
        "num_attention_experts": 3 if mixture.attention_type == "moa" else 1,
        "expert_policy": "dense",
        "router_type": mixture.router_type,
    }
    assert {key: getattr(model.config, key) for key in expected} == expected
    # one block of units, and of heads, does a part of the work: the experts are no copies
    model.set_policy("topk", num_experts_per_tok=1, attention_experts_per_tok=1)
    assert relative_difference(model, LlamaForCausalLM.from_pretrained(dense)) > 1e-2


def test_tied_embeddings_mistral_and_gelu_are_carried(small_data: SmallData, tmp_path: Path) -> None:
    sizes = {**SIZES, "tie_word_embeddings": True, "hidden_act": "gelu", "sliding_window": None, "head_dim": 10}
    folder = save_dense(tmp_path / "mistral", small_data.tokenizer, MistralForCausalLM(MistralConfig(**sizes)))

    upcycle(folder, tmp_path / "model", Mixture(num_experts=6))

    model = DSMoEForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative_difference(model, MistralForCausalLM.from_pretrained(folder)) < 1e-5


def test_uniform_scores_that_the_first_step_can_change(dense: Path, tmp_path: Path) -> None:
    """At equal scores the mutual-information loss has no slope; the language model's loss moves every router."""
    for mixture, last in ((Mixture(4), "weight"), (Mixture(4, router_type="mlp", router_hidden_size=16), "fc2.weight")):
        upcycle(dense, tmp_path / "model", mixture, overwrite=True)
        model = DSMoEForCausalLM.from_pretrained(tmp_path / "model")

        outputs = model(token_ids(), labels=token_ids(), output_router_logits=True)
        outputs.loss.backward()

        assert all(torch.equal(logits, torch.zeros_like(logits)) for logits in outputs.router_logits)
        routers = {name: p for name, p in model.named_parameters() if ".router." in name or ".gate." in name}
        moving = [name for name, p in routers.items() if p.grad is not None and float(p.grad.abs().max()) > 1e-7]
        assert moving == [name for name in routers if name.endswith(last)]
        assert len(moving) == 2 * 3


def test_the_tokenizer_travels_and_the_result_imports(dense: Path, small_data: SmallData, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "model", Mixture(num_experts=8), dtype=torch.bfloat16)
    import_model(tmp_path / "model", tmp_path / "step")

    text = "def main(argument):\n    return 1"
    assert load_tokenizer(str(tmp_path / "model")).encode(text) == load_tokenizer(small_data.tokenizer).encode(text)
    assert "Made of the dense model `llama`" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "step" / "progress.json").is_file()


def test_the_seed_decides_the_mlp_routers(dense: Path, tmp_path: Path) -> None:
    def first_layers(seed: int) -> list[Tensor]:
        mixture = Mixture(num_experts=4, router_type="mlp", router_hidden_size=16, seed=seed)
        upcycle(dense, tmp_path / "model", mixture, overwrite=True)
        model = DSMoEForCausalLM.from_pretrained(tmp_path / "model")
        return [parameter for name, parameter in model.named_parameters() if name.endswith("fc1.weight")]

    one, again, other = first_layers(1), first_layers(1), first_layers(2)
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert not any(torch.equal(one[0], weight) for weight in one[1:])


@pytest.mark.parametrize(
    ("changes", "mixture", "message"),
    [
        ({}, Mixture(num_experts=7), r"--num-experts = 7: must be at least 2 and divide the 288 hidden units"),
        ({}, Mixture(num_experts=1), r"--num-experts = 1: must be at least 2"),
        ({"num_key_value_heads": 6}, Mixture(num_experts=8), r"--attention = 'moa': every query head has a .*give gqa"),
        ({"attention_bias": True}, Mixture(num_experts=8), r"attention_bias = True: .* cannot be carried"),
        ({"mlp_bias": True}, Mixture(num_experts=8), r"mlp_bias = True: .* cannot be carried"),
        ({"hidden_act": "relu"}, Mixture(num_experts=8), r"hidden_act = 'relu': only silu and gelu"),
        ({"vocab_size": 512}, Mixture(num_experts=8), r"vocab_size = 512: the tokenizer .* has 500 tokens"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
            Mixture(num_experts=8),
            r"rope_parameters\.rope_type = 'linear'",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(
    small_data: SmallData, tmp_path: Path, changes: dict[str, Any], mixture: Mixture, message: str
) -> None:
    folder = save_dense(tmp_path / "dense", small_data.tokenizer, **changes)

    with pytest.raises(DSMoEError, match=message) as error:
        upcycle(folder, tmp_path / "model", mixture)

    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_other_architectures_are_refused(dense: Path, small_data: SmallData, tmp_path: Path) -> None:
    qwen = save_dense(tmp_path / "qwen", small_data.tokenizer, Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    window = MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": 8}))
    mistral = save_dense(tmp_path / "mistral", small_data.tokenizer, window)
    upcycle(dense, tmp_path / "model", Mixture(num_experts=8))

    for folder, message in (
        (qwen, r"model_type = 'qwen2'"),
        (mistral, r"sliding_window = 8"),
        (tmp_path / "model", r"is a DS-MoE already"),
    ):
        with pytest.raises(DSMoEError, match=message):
            upcycle(folder, tmp_path / "again", Mixture(num_experts=8))


@pytest.fixture
def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 258, "tie_word_embeddings": True}))


def write_gguf(
    path: Path, model: LlamaForCausalLM, scaling: str = "none", further: dict[str, Tensor] | None = None
) -> None:
    """As llama.cpp's converter does: rows of queries and keys in pairs of rotated units, its own names."""
    from gguf import GGUFWriter, RopeScalingType, TokenType

    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_type(RopeScalingType(scaling))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<|endoftext|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output", "self_attn.": "attn_"}
    names |= {"mlp.": "ffn_", "_proj": "", "model.layers": "blk", "model.": ""}
    for name, tensor in {**dict(model.named_parameters()), **(further or {})}.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        values = tensor.detach()
        heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
        for ending, number in heads.items():
            if name.endswith(ending):
                values = values.unflatten(0, (number, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read(tied_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tied_llama)

    upcycle(tmp_path, tmp_path / "model", Mixture(num_experts=8), gguf_file="model.gguf")

    model = DSMoEForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(0, 258, (2, 30), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = tied_llama.eval()(ids).logits
        assert float((model(ids).logits - expected).abs().max() / expected.abs().max()) < 1e-5
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id, tokenizer.encode("th")) == (258, 257, [256])


def test_what_a_gguf_file_has_beyond_is_refused(tied_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "bias.gguf", tied_llama, further={"blk.1.attn_q.bias": torch.ones(48)})
    write_gguf(tmp_path / "scaled.gguf", tied_llama, scaling="linear")
    write_gguf(tmp_path / "frequencies.gguf", tied_llama, further={"rope_freqs.weight": torch.ones(4)})

    for name, message in (
        ("bias", r"has blk\.1\.attn_q\.bias, which a DS-MoE has no place for"),
        ("scaled", r"rope\.scaling\.type': 'linear'.*only unscaled"),
        ("frequencies", r"has rope_freqs\.weight"),
    ):
        with pytest.raises(DSMoEError, match=message):
            upcycle(tmp_path, tmp_path / "model", Mixture(num_experts=8), gguf_file=f"{name}.gguf")


def test_a_gguf_that_is_none_is_one_line(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))

    for folder, name, message in ((dense, "no.gguf", "no such file"), (tmp_path, "broken.gguf", r"broken\.gguf: ")):
        with pytest.raises(DSMoEError, match=message) as error:
            upcycle(folder, tmp_path / "model", Mixture(num_experts=8), gguf_file=name)
        assert "\n" not in str(error.value)


def test_the_command_line_upcycles(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model"
    options = ["--num-experts", "4", "--attention", "gqa", "--router", "mlp", "--router-hidden-size", "16"]
    monkeypatch.setattr(sys, "argv", ["upcycle", "--model", str(dense), "--output", str(output), *options])

    main()

    config = DSMoEForCausalLM.from_pretrained(output).config
    assert (config.num_experts, config.attention_type, config.router_hidden_size) == (4, "gqa", 16)
