"""Tokenizers without files and small text encoders of the classes that the flow transformers use."""

from __future__ import annotations

from typing import Any

from tests.tiny import _byte_symbols

QWEN_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{%- set mark = 'SYSTEM_PROMPT' if m['role'] == 'system' else 'INST' %}"
    "{{- '[' + mark + ']' }}{%- for part in m['content'] %}{{- part['text'] }}{%- endfor %}{{- '[/' + mark + ']' }}"
    "{%- endfor %}"
)


def qwen_tokenizer() -> Any:
    """Bytes and the marks of a chat."""
    from transformers import Qwen2Tokenizer

    end = "<|endoftext|>"
    vocab = {symbol: i for i, symbol in enumerate([*_byte_symbols(), end])}
    options: dict[str, Any] = {"model_max_length": 4096, "unk_token": None, "eos_token": end, "pad_token": end}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def mistral_tokenizer() -> Any:
    """Bytes and the marks of a conversation, padded on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "<s>", "</s>", "<pad>", *_byte_symbols()]
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=4096, padding_side="left", **named)
    marks = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def qwen3(words: int, layers: int = 3, width: int = 32, cls: str = "Qwen3Model") -> Any:
    """A Qwen3 of a few thousand numbers a layer."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }
    return getattr(transformers, cls)(transformers.Qwen3Config(**settings))


def mistral3(words: int, layers: int, width: int) -> Any:
    """A Mistral 3 with a picture tower that nothing is shown to."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": words + 4,
        "hidden_size": width,
        "intermediate_size": width,
        "max_position_embeddings": 1024,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": None,
    }
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=words + 1)
    return Mistral3ForConditionalGeneration(config)


def qwen_vl(words: int, layers: int, width: int, cls: str) -> Any:
    """Qwen2.5-VL or Qwen3-VL with a picture tower that nothing is shown to; the picture's ids are beyond the words."""
    import transformers

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text: dict[str, Any] = {
        "vocab_size": words + 8,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        **heads,
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    if cls.startswith("Qwen2_5"):
        rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
        text |= {"rope_scaling": rope, "rope_theta": 1e6}
    else:
        vision["deepstack_visual_indexes"] = [0]
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    numbers: dict[str, Any] = {name: words + 1 + i for i, name in enumerate(marks)}
    config = getattr(transformers, f"{cls.partition('VL')[0]}VLConfig")
    return getattr(transformers, cls)(config(text_config=text, vision_config=vision, **numbers))


def t5_tokenizer() -> Any:
    """Single characters; T5's numbers for padding, end and unknown."""
    from transformers import T5Tokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-:;()"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(words: int, width: int) -> Any:
    """T5's encoder, 2 layers."""
    from transformers import T5Config, T5EncoderModel

    settings: dict[str, Any] = {
        "vocab_size": words,
        "d_model": width,
        "d_kv": 8,
        "d_ff": width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }
    return T5EncoderModel(T5Config(**settings))
