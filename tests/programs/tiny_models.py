"""Tiny random models of many architectures, with two layers and the byte tokenizer of the tests."""

from pathlib import Path
from typing import Any

IDS = {"vocab_size": 262, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
NO_RATES = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# By name: the class of the config in transformers, and its values.
ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT | NO_DROPOUT),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": 8, "max_position_embeddings": 128, "resid_dropout": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", SHAPE),
    "opt": ("OPTConfig", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma": ("GemmaConfig", HEADS),
    "gemma2": ("Gemma2Config", HEADS | SLIDING | {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", HEADS | SLIDING | {"final_logit_softcapping": 3.0}),
    "phi": ("PhiConfig", SHAPE),
    "phi3": ("Phi3Config", GROUPED | {"resid_pdrop": 0.0}),
    "falcon": ("FalconConfig", SHAPE | {"alibi": False}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "stablelm": ("StableLmConfig", SHAPE | {"num_key_value_heads": 4}),
    "olmo": ("OlmoConfig", SHAPE),
    "olmo2": ("Olmo2Config", SHAPE),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
    "smollm3": ("SmolLM3Config", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", HEADS | EXPERTS),
}  # fmt: skip
# Further attention models, for the benchmark only.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJConfig", GPT | NO_DROPOUT | {"rotary_dim": 4}),
    "codegen": ("CodeGenConfig", GPT | NO_DROPOUT | {"rotary_dim": 4, "n_ctx": 128}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT | NO_DROPOUT),
    "starcoder2": ("Starcoder2Config", GROUPED | {"sliding_window": 8}),
    "gpt_oss": ("GptOssConfig", HEADS | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4": ("Glm4Config", HEADS),
    "exaone4": ("Exaone4Config", GROUPED | SLIDING),
    "nemotron": ("NemotronConfig", GROUPED),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64} | NO_RATES),
    "biogpt": ("BioGptConfig", SHAPE | NO_RATES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "openai_gpt": ("OpenAIGPTConfig", GPT | NO_DROPOUT),
    "hunyuan": ("HunYuanDenseV1Config", HEADS),
    "arcee": ("ArceeConfig", GROUPED),
}
# Models whose memory of the text is a state, at least in some layers.
STATE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "falcon_mamba": ("FalconMambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        SHAPE | {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32, "logits_soft_cap": 3.0},
    ),
    "jamba": (
        "JambaConfig",
        GROUPED
        | {
            "num_experts": 2, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "mamba_d_state": 8, "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextConfig", HEADS | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32}),
    "qwen3_5": ("Qwen3_5TextConfig", HEADS | LINEAR),
    "falcon_h1": (
        "FalconH1Config",
        GROUPED | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "lm_head_multiplier": 0.5},
    ),
    "bamba": ("BambaConfig", GROUPED | MAMBA | {"attn_layer_indices": [1]}),
    "minimax": (
        "MiniMaxConfig",
        HEADS
        | {
            "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}),
}  # fmt: skip
ARCHITECTURES = ATTENTION | MORE | STATE


def build_config(name: str, **values: Any) -> Any:
    """Return the configuration of a tiny model; values replace those of the table."""
    import transformers

    kind, own = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**(IDS | own | values))
    if "router_aux_loss_coef" in dir(config):
        config.router_aux_loss_coef = 0.0  # TRL adds this loss of the experts to sft's
    for part in ("initializer_range", "init_std"):
        if part in dir(config):
            setattr(config, part, 0.2)  # large weights: answers differ, and so do logits that are capped
    return config


def build_model(name: str, seed: int = 0, labels: int | None = None, **values: Any) -> Any:
    """Return a random model in float32 and eval mode: a language model, or a classifier with so many labels."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = build_config(name, **values)
    auto: Any = AutoModelForCausalLM
    if labels is not None:
        config.num_labels, auto = labels, AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).float().eval()


def save_model(folder: Path, name: str, tokenizer: Any, **values: Any) -> str:
    """Save a tiny model with its tokenizer, and return the folder."""
    build_model(name, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
