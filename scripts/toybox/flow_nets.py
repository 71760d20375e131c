"""The networks of toybox-flow as transformers and diffusers have them: tokenizer, text encoder, transformer."""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import json

import torch
from diffusers import ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from diffusekrona_train.models.zimage import ZImage

WIDTH, LAYERS, HEADS, TEXT_WIDTH, LENGTH = 192, 6, 6, 128, 32
"""Of the transformer; of the text encoder; and the tokens a caption is padded to (the longest has 21)."""
TAP = 3
"""Layers of the transformer after which it is compared with the identity network."""
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)

# ---- captions --------------------------------------------------------------------------------------------------------


def new_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Byte-level BPE of 1,016 tokens as Qwen's, learnt on captions in the chat template; special tokens follow."""
    bpe, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    bpe.pre_tokenizer = bytewise(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1016, initial_alphabet=bytewise.alphabet(), special_tokens=[])
    bpe.train_from_iterator([f"user\n{text}\nassistant\n" for text in texts], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = {word: i for i, word in enumerate(sorted(model["vocab"], key=model["vocab"].get))}
    vocab["<|endoftext|>"] = len(vocab)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=512, **ends)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokens(tokenizer: Qwen2Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(N, LENGTH) ids of the texts in the chat template, and which of them are no padding."""
    said = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for text in texts
    ]
    rows = tokenizer(said, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    real = rows.attention_mask.bool()
    assert not real.all(dim=1).any(), "a caption fills its row and may be cut"
    return rows.input_ids, real


# ---- networks --------------------------------------------------------------------------------------------------------


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """Three layers, of which the second's output is read: the third is never trained."""
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        **ends,
    )
    return Qwen3Model(config)


@torch.no_grad()
def new_transformer() -> ZImageTransformer2DModel:
    """Its output begins at zero, its gates somewhat open (tanh of 0.4)."""
    made = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=8,
        dim=WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[544, 64, 64],
    )
    for name, p in made.named_parameters():
        modulation = "adaLN_modulation" in name
        if name.endswith("pad_token") or (modulation and p.ndim == 2):
            nn.init.normal_(p, std=0.02)
        elif p.ndim == 2:
            nn.init.normal_(p, std=0.7 * p.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        if modulation and p.shape == (4 * WIDTH,):
            p.view(4, WIDTH)[1::2] = 0.4
    nn.init.zeros_(made.all_final_layer["2-1"].linear.weight)
    return made


class Nets(nn.Module):
    """The transformer, its text encoder, and the head that compares its middle with the identity network."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        self.transformer, self.text_encoder = new_transformer(), new_text_encoder(tokenizer)
        self.head = nn.Sequential(nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, 128))
        self.middle = torch.empty(0)
        self.transformer.layers[TAP - 1].register_forward_hook(self.keep_middle)

    def keep_middle(self, layer: nn.Module, given: tuple, out: Tensor) -> None:
        self.middle = out[:, :64]  # image tokens come first

    def read(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B, LENGTH) ids -> (B, LENGTH, TEXT_WIDTH), as ZImagePipeline reads captions."""
        said = self.text_encoder(input_ids=ids, attention_mask=real, output_hidden_states=True)
        return said.hidden_states[-2]

    def forward(self, x_t: Tensor, sigma: Tensor, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (B, 8, 16, 16) and the head's features (B, 64, 128)."""
        conditioning = {"prompt_embeds": self.read(ids, real), "prompt_embeds_mask": real}
        velocity = ZImage().predict(self.transformer, x_t, sigma, conditioning)
        return velocity, self.head(self.middle.float())

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Parameters for Muon, for AdamW, and of the text encoder for AdamW at its own rate."""
        inner = {
            name: p
            for name, p in self.transformer.named_parameters()
            if p.ndim == 2 and (".attention." in name or ".feed_forward." in name)
        }
        own = [p for name, p in self.transformer.named_parameters() if name not in inner]
        return list(inner.values()), [*own, *self.head.parameters()], list(self.text_encoder.parameters())
