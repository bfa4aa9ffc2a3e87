"""A random GLM-4.5 of 4 layers with its MTP layer and a tokenizer, as a Hugging Face folder: what the tests serve and convert."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKENS = ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
                  "<think>", "</think>"]
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}\n<think></think>"
    "{% endif %}{% endif %}"
)


def tiny_config(**changes) -> Glm4MoeConfig:
    """The shape of the suite's tiny model, with a small vocabulary."""
    return Glm4MoeConfig(**{
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.5,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "use_qk_norm": True,
        "attention_bias": True, "tie_word_embeddings": False, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "initializer_range": 0.08, "num_nextn_predict_layers": 1, "eos_token_id": 256, "pad_token_id": 256,
        "dtype": "float32",
    } | changes)


def random_weights(config: Glm4MoeConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its Hugging Face name, float32, the MTP layer at model.layers.{num_layers}."""
    import tempfile

    from safetensors.torch import load_file

    torch.manual_seed(seed)
    layers = config.num_hidden_layers
    deeper = Glm4MoeConfig(**config.to_dict() | {"num_hidden_layers": layers + 1})
    model = Glm4MoeForCausalLM(deeper).float()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias") or name.endswith("bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = {name: tensor for shard in Path(folder).glob("*.safetensors") for name, tensor in load_file(shard).items()}
    hidden, mtp = config.hidden_size, f"model.layers.{layers}"
    tensors[f"{mtp}.enorm.weight"] = 1 + 0.1 * torch.randn(hidden)
    tensors[f"{mtp}.hnorm.weight"] = 1 + 0.1 * torch.randn(hidden)
    tensors[f"{mtp}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.08
    tensors[f"{mtp}.shared_head.norm.weight"] = 1 + 0.1 * torch.randn(hidden)
    return tensors


def save_model(folder: Path, config: Glm4MoeConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes a folder that transformers and SGLang load."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and the control tokens: 266 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS[1:]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [fast.eos_token_id]}))
