"""The transformers that users bring: one table of Hugging Face, timm and torch models, tiny, with random weights.

Each is built from a configuration, nothing is downloaded. Widths are multiples of 64, there is no dropout, and every
kind of layer of the real model is there.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

D, FF, LAYERS, HEADS, VOCAB, TOKENS = 64, 128, 2, 4, 128, 16


@dataclass(frozen=True)
class Family:
    """One model.

    make: (model, its inputs). ffn, attention: patterns of the names of the weights that its feed-forward layers and its
    attention projections have, read off the model's source and not off what sparse24 finds. stays_dense: patterns of
    those among them that cannot be sparse -> a part of the reason. fullgraph: whether the model itself is one graph.
    library: the package it needs beside torch.
    """

    name: str
    library: str
    cls: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    ffn: str
    attention: str
    stays_dense: dict[str, str] | None = None
    fullgraph: bool = True

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model, inputs = self.make()
        return model.train(), inputs

    def named(self, model: nn.Module, pattern: str) -> list[str]:
        """The weights whose name matches, tied ones once."""
        return [name for name, _ in model.named_parameters() if re.search(rf"(?:^|\.)(?:{pattern})$", name)]

    def feed_forward(self, model: nn.Module) -> list[str]:
        return self.named(model, self.ffn)

    def projections(self, model: nn.Module) -> list[str]:
        return self.named(model, self.attention)

    def expected(self, model: nn.Module, names: list[str]) -> list[str]:
        """Of the names the ones that become sparse."""
        return [n for n in names if self.why_dense(n) is None]

    def why_dense(self, name: str) -> str | None:
        found = [why for pattern, why in (self.stays_dense or {}).items() if re.search(pattern, name)]
        return found[0] if found else None


def loss_of(output: Any) -> Tensor:
    """A number to train on: the model's own loss, or the mean square of the first output."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    first = output if isinstance(output, Tensor) else output[0]
    return first.float().square().mean()


# --------------------------------------------------------------------------------------------------------------- inputs


def text(vocab: int = VOCAB) -> Tensor:
    return torch.randint(3, vocab, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def causal(vocab: int = VOCAB) -> dict[str, Any]:
    ids = text(vocab)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def masked() -> dict[str, Any]:
    return {"input_ids": text(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long), "labels": text()}


def seq2seq() -> dict[str, Any]:
    return {"input_ids": text(), "labels": text()[:, :8].contiguous(), "use_cache": False}


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def image(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": pixels(size), "labels": torch.tensor([0, 1])}


# --------------------------------------------------------------------------------------------------------- constructors

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN_HEADS = {k: v for k, v in DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = {
    **{k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")},
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 2,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": D,
    "encoder_ffn_dim": FF,
    "decoder_ffn_dim": FF,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": D,
    "d_kv": 16,
    "d_ff": FF,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def hf(cls: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """A transformers class from the configuration class that it names."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = getattr(importlib.import_module("transformers"), cls)
        return model(model.config_class(**config)), inputs()

    return make


def timm(cls: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import timm

        model = timm.create_model(cls, pretrained=False, num_classes=10, img_size=size, **options)
        return model, {"x": pixels(size)}

    return make


def whisper_encoder() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(**{**SEQ2SEQ, "max_source_positions": 8, "num_mel_bins": 16})
    return WhisperEncoder(config), {"input_features": torch.randn(2, 16, 16)}


def torch_transformer() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Transformer(D, HEADS, LAYERS, LAYERS, FF, dropout=0.0, batch_first=True)
    return model, {"src": torch.randn(2, 16, D), "tgt": torch.randn(2, 8, D)}


def torch_encoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False), {"src": torch.randn(2, 16, D)}


def example(cls: str, width: int = D) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        blocks = importlib.import_module("blocks")
        return getattr(blocks, cls)(vocab=VOCAB, width=width, depth=LAYERS, heads=HEADS, ff=FF), {"tokens": text()}

    return make


QKVO = r"(q_proj|k_proj|v_proj|o_proj)\.weight"
GATED = r"mlp\.(gate_proj|up_proj|down_proj)\.weight"
BERT_FFN = r"(intermediate\.dense|layer\.\d+\.output\.dense)\.weight"
BERT_ATTENTION = r"attention\.(self\.(query|key|value)|output\.dense)\.weight"
BART_FFN, BART_ATTENTION = r"(fc1|fc2)\.weight", r"(q_proj|k_proj|v_proj|out_proj)\.weight"
TORCH_FFN = r"(linear1|linear2)\.weight"
TORCH_ATTENTION = r"(in_proj_weight|out_proj\.weight)"
VIT_FFN = r"mlp\.(fc1|fc2)\.weight"
VIT_ATTENTION = r"(attention\.(query|key|value)|attention\.output\.dense|(q|k|v|o)_proj)\.weight"

FAMILIES = [
    Family(
        "GPT-2", "transformers", "GPT2LMHeadModel",
        hf("GPT2LMHeadModel", causal, vocab_size=VOCAB, n_positions=64, n_embd=D, n_layer=LAYERS, n_head=HEADS,
           n_inner=FF, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
        r"mlp\.(c_fc|c_proj)\.weight", r"attn\.(c_attn|c_proj)\.weight",
        fullgraph=False,  # its loss logs a warning
    ),
    Family("BERT", "transformers", "BertForMaskedLM", hf("BertForMaskedLM", masked, **ENCODER), BERT_FFN,
           BERT_ATTENTION),
    Family("RoBERTa", "transformers", "RobertaForMaskedLM", hf("RobertaForMaskedLM", masked, **ENCODER), BERT_FFN,
           BERT_ATTENTION),
    Family("Marian (Transformer-base)", "transformers", "MarianMTModel", hf("MarianMTModel", seq2seq, **SEQ2SEQ),
           BART_FFN, BART_ATTENTION),
    Family("BART", "transformers", "BartForConditionalGeneration",
           hf("BartForConditionalGeneration", seq2seq, **SEQ2SEQ), BART_FFN, BART_ATTENTION),
    Family("nn.Transformer", "torch", "nn.Transformer", torch_transformer, TORCH_FFN, TORCH_ATTENTION,
           {r"multihead_attn\.in_proj_weight": "cut or moved"}),
    Family("nn.TransformerEncoder", "torch", "nn.TransformerEncoder", torch_encoder, TORCH_FFN, TORCH_ATTENTION),
    Family("T5", "transformers", "T5ForConditionalGeneration", hf("T5ForConditionalGeneration", seq2seq, **T5),
           r"DenseReluDense\.(wi|wo)\.weight", r"\w+Attention\.(q|k|v|o)\.weight"),
    Family("Flan-T5", "transformers", "T5ForConditionalGeneration",
           hf("T5ForConditionalGeneration", seq2seq, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
           r"DenseReluDense\.(wi_0|wi_1|wo)\.weight", r"\w+Attention\.(q|k|v|o)\.weight"),
    Family("Llama", "transformers", "LlamaForCausalLM", hf("LlamaForCausalLM", causal, **DECODER), GATED, QKVO),
    Family("Mistral", "transformers", "MistralForCausalLM",
           hf("MistralForCausalLM", causal, **DECODER, sliding_window=8), GATED, QKVO),
    Family("Qwen3", "transformers", "Qwen3ForCausalLM", hf("Qwen3ForCausalLM", causal, **DECODER), GATED, QKVO),
    Family("Gemma", "transformers", "GemmaForCausalLM", hf("GemmaForCausalLM", causal, **DECODER), GATED, QKVO),
    Family("Gemma 3", "transformers", "Gemma3ForCausalLM",
           hf("Gemma3ForCausalLM", causal, **DECODER, sliding_window=8), GATED, QKVO),
    Family("Phi-2", "transformers", "PhiForCausalLM",
           hf("PhiForCausalLM", causal, **PLAIN_HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
              attention_dropout=0.0), VIT_FFN, r"(q_proj|k_proj|v_proj|dense)\.weight"),
    Family("Phi-3", "transformers", "Phi3ForCausalLM", hf("Phi3ForCausalLM", causal, **PLAIN_HEADS),
           r"mlp\.(gate_up_proj|down_proj)\.weight", r"(qkv_proj|o_proj)\.weight"),
    Family("OPT", "transformers", "OPTForCausalLM",
           hf("OPTForCausalLM", causal, vocab_size=VOCAB, hidden_size=D, ffn_dim=FF, num_hidden_layers=LAYERS,
              num_attention_heads=HEADS, max_position_embeddings=64, dropout=0.0, word_embed_proj_dim=D,
              pad_token_id=0),
           r"(fc1|fc2)\.weight", r"(q_proj|k_proj|v_proj|out_proj)\.weight"),
    Family("ModernBERT", "transformers", "ModernBertForMaskedLM",
           hf("ModernBertForMaskedLM", masked, **{k: v for k, v in ENCODER.items() if "prob" not in k}, pad_token_id=0,
              cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=8),
           r"mlp\.(Wi|Wo)\.weight", r"attn\.(Wqkv|Wo)\.weight"),
    Family("Mixtral", "transformers", "MixtralForCausalLM",
           hf("MixtralForCausalLM", causal, **DECODER, num_local_experts=4, num_experts_per_tok=2),
           r"experts\.(gate_up_proj|down_proj)", QKVO, {r"experts\.": "stack of 4 matrices"}),
    Family("Qwen3-MoE", "transformers", "Qwen3MoeForCausalLM",
           hf("Qwen3MoeForCausalLM", causal, **DECODER, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
              mlp_only_layers=[1]),
           rf"experts\.(gate_up_proj|down_proj)|{GATED}", QKVO, {r"experts\.": "stack of 4 matrices"}),
    Family("ViT", "transformers", "ViTForImageClassification", hf("ViTForImageClassification", image, **VISION),
           VIT_FFN, VIT_ATTENTION),
    Family("DeiT", "transformers", "DeiTForImageClassification", hf("DeiTForImageClassification", image, **VISION),
           VIT_FFN, VIT_ATTENTION),
    Family("Swin", "transformers", "SwinForImageClassification",
           hf("SwinForImageClassification", lambda: image(32), image_size=32, patch_size=2, embed_dim=D, depths=[2, 2],
              num_heads=[2, 4], window_size=4, mlp_ratio=2.0, drop_path_rate=0.0, num_labels=2),
           VIT_FFN, VIT_ATTENTION),
    Family("DINOv2", "transformers", "Dinov2ForImageClassification",
           hf("Dinov2ForImageClassification", image, **{k: v for k, v in VISION.items() if k != "intermediate_size"},
              use_swiglu_ffn=True, mlp_ratio=3),
           GATED, VIT_ATTENTION),
    Family("Whisper encoder", "transformers", "WhisperEncoder", whisper_encoder, BART_FFN, BART_ATTENTION),
    Family("ViT (timm)", "timm", "vit_tiny_patch16_224",
           timm("vit_tiny_patch16_224", 16, patch_size=4, embed_dim=D, depth=LAYERS, num_heads=HEADS),
           r"mlp\.(fc1|fc2)\.weight", r"attn\.(qkv|proj)\.weight"),
    Family("DeiT (timm)", "timm", "deit_tiny_distilled_patch16_224",
           timm("deit_tiny_distilled_patch16_224", 16, patch_size=4, embed_dim=D, depth=LAYERS, num_heads=HEADS),
           r"mlp\.(fc1|fc2)\.weight", r"attn\.(qkv|proj)\.weight"),
    Family("Swin (timm)", "timm", "swin_tiny_patch4_window7_224",
           timm("swin_tiny_patch4_window7_224", 32, patch_size=2, window_size=4, embed_dim=D, depths=(2, 2),
                num_heads=(2, 4), drop_path_rate=0.0),
           r"mlp\.(fc1|fc2)\.weight", r"attn\.(qkv|proj)\.weight"),
    Family("DINOv2 (timm)", "timm", "vit_giant_patch14_dinov2",
           timm("vit_giant_patch14_dinov2", 16, patch_size=4, embed_dim=D, depth=LAYERS, num_heads=HEADS, mlp_ratio=4),
           r"mlp\.(fc1|fc2)\.weight", r"attn\.(qkv|proj)\.weight"),
    Family("nanoGPT", "examples", "blocks.NanoGPT", example("NanoGPT"), r"mlp\.(fc|proj)\.weight",
           r"attention\.(qkv|proj)\.weight"),
    Family("torchtitan", "examples", "blocks.Titan", example("Titan", width=2 * D), r"feed_forward\.w[123]\.weight",
           r"attention\.w[qkvo]\.weight"),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
