"""Architectures of the `transformers` library, small and with random weights: NETWORKS[name]() -> (module, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


class First(nn.Module):
    """The first output of a model, as a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def of(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, return_dict=False)[0]


class Text(First):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.of(input_ids=input_ids, attention_mask=attention_mask)


class Generating(First):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.of(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


class Translating(First):
    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.of(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False)


class Image(First):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.of(pixel_values=pixel_values)


class Sound(First):
    def forward(self, input_values: Tensor) -> Tensor:
        return self.of(input_values=input_values)


def _text() -> Inputs:
    return {"input_ids": torch.randint(3, 60, (3, 9)), "attention_mask": torch.ones(3, 9).long()}


def _two_texts() -> Inputs:
    return {"input_ids": torch.randint(3, 60, (3, 9)), "decoder_input_ids": torch.randint(3, 60, (3, 6))}


def _image() -> Inputs:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 64, **WIDTHS}
PIXELS = {"image_size": 32, "patch_size": 8, **WIDTHS}

# name: (class of the configuration, of the model, how it is called, its inputs, sizes)
DESCRIPTIONS: dict[str, tuple[str, str, type[First], Callable[[], Inputs], dict[str, Any]]] = {
    "HfBert": ("BertConfig", "BertModel", Text, _text, WORDS),
    "HfRoberta": ("RobertaConfig", "RobertaForSequenceClassification", Text, _text, WORDS),
    "HfDistilBert": (
        "DistilBertConfig", "DistilBertModel", Text, _text,
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "HfAlbert": ("AlbertConfig", "AlbertModel", Text, _text, {**WORDS, "embedding_size": 16}),
    "HfElectra": ("ElectraConfig", "ElectraModel", Text, _text, {**WORDS, "embedding_size": 16}),
    "HfMpnet": ("MPNetConfig", "MPNetModel", Text, _text, WORDS),
    "HfDeberta": (
        "DebertaV2Config", "DebertaV2Model", Text, _text,
        {**WORDS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "HfGpt2": (
        "GPT2Config", "GPT2LMHeadModel", Generating, _text,
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    "HfLlama": ("LlamaConfig", "LlamaForCausalLM", Generating, _text, {**WORDS, "num_key_value_heads": 2}),
    "HfQwen": ("Qwen2Config", "Qwen2ForCausalLM", Generating, _text, {**WORDS, "num_key_value_heads": 2}),
    "HfT5": (
        "T5Config", "T5ForConditionalGeneration", Translating, _two_texts,
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "HfBart": (
        "BartConfig", "BartModel", Translating, _two_texts,
        {
            "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        },
    ),
    "HfVit": ("ViTConfig", "ViTModel", Image, _image, PIXELS),
    "HfDino": ("Dinov2Config", "Dinov2Model", Image, _image, PIXELS),
    "HfClip": ("CLIPVisionConfig", "CLIPVisionModel", Image, _image, PIXELS),
    "HfSwin": (
        "SwinConfig", "SwinModel", Image, _image,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "HfConvNext": ("ConvNextConfig", "ConvNextModel", Image, _image, {"hidden_sizes": [16, 32], "depths": [1, 2]}),
    "HfSegformer": (
        "SegformerConfig", "SegformerForSemanticSegmentation", Image, _image,
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "HfMobileVit": (
        "MobileViTConfig", "MobileViTModel", Image, lambda: {"pixel_values": torch.randn(3, 3, 64, 64)},
        {
            "image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
            "num_attention_heads": 2,
        },
    ),
    "HfWav2Vec2": (
        "Wav2Vec2Config", "Wav2Vec2Model", Sound, lambda: {"input_values": torch.randn(2, 800)},
        {**WIDTHS, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    ),
    "HfAudioSpectrogram": (
        "ASTConfig", "ASTModel", Sound, lambda: {"input_values": torch.randn(2, 64, 32)},
        {**WIDTHS, "num_mel_bins": 32, "max_length": 64},
    ),
}  # fmt: skip


def _made(name: str) -> tuple[nn.Module, Inputs]:
    import transformers

    config, model, call, inputs, sizes = DESCRIPTIONS[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return call(built), inputs()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    name: (lambda name=name: _made(name)) for name in DESCRIPTIONS
}
