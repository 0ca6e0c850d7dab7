"""vLLM's entry point (group `vllm.general_plugins` in pyproject.toml): exports are served without remote code."""

from typing import Any

from dsmoe_megatron.errors import ConfigurationError

ARCHITECTURE = "DSMoEForCausalLM"


def register() -> None:
    """Make the exported architecture known. vLLM calls it in each of its processes, perhaps more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig

    AutoConfig.register(DSMoEConfig.model_type, DSMoEConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ConfigurationCheck
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # by name: vLLM imports it in the process that runs the model
        ModelRegistry.register_model(ARCHITECTURE, f"dsmoe_megatron.inference.vllm_model:{ARCHITECTURE}")


class ConfigurationCheck:
    """What cannot be served is refused in the first process, before anything is loaded; vLLM calls both functions."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing is known of the parallel layout yet."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the policy, the layout and the format of the weights.

        Raises:
            ConfigurationError: the policy does not fit the model, or it, the layout or the format cannot be served.
        """
        from dsmoe_megatron.inference.policy import ExpertPolicy, PolicyError

        config = vllm_config.model_config.hf_config
        policy = ExpertPolicy.from_config(config)
        try:
            config.check_policy(policy)  # --hf-overrides changes the configuration after its own checks
        except PolicyError as error:
            raise ConfigurationError(error.key, error.value, error.rule) from None
        if policy.expert_policy == "threshold_topk":
            rule = "depends on the other requests of the batch, for evaluation only; serve dense, topk or threshold"
            raise ConfigurationError("expert_policy", policy.expert_policy, rule)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        whole = {"num_experts": config.num_experts > 1, "num_key_value_heads": config.attention_type == "moa"}
        for key in (key for key, is_cut in whole.items() if is_cut):
            if getattr(config, key) % ranks:
                rule = f"must divide {key} = {getattr(config, key)}"
                raise ConfigurationError("--tensor-parallel-size", ranks, rule)
        _read_safetensors_alone(vllm_config.load_config)


def _read_safetensors_alone(load_config: Any) -> None:
    """Where a folder has no safetensors, vLLM would take pickled files instead; an export never holds any.

    Raises:
        ConfigurationError: pickled files are asked for.
    """
    if load_config.load_format in ("pt", "npcache"):
        raise ConfigurationError("--load-format", load_config.load_format, "unpickles files; leave it, or safetensors")
    if load_config.load_format in ("auto", "hf"):
        load_config.load_format = "safetensors"
