"""vLLM's entry point (group `vllm.general_plugins` in pyproject.toml): exports are served without remote code."""

ARCHITECTURE = "DSMoEForCausalLM"


def register() -> None:
    """Make the exported architecture known. vLLM calls it in each of its processes, perhaps more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig

    AutoConfig.register(DSMoEConfig.model_type, DSMoEConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # by name: vLLM imports it in the process that runs the model
        ModelRegistry.register_model(ARCHITECTURE, f"dsmoe_megatron.inference.vllm_model:{ARCHITECTURE}")
