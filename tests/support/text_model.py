"""A tiny byte-level tokenizer with a chat template, as a model folder has it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, END = "<s>", "<|im_end|>"
SPECIAL = (BOS, END, "<|im_start|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, bos: bool = False) -> Tokenizer:
    """Returns a tokenizer of one id per byte (0 to 255), then `SPECIAL`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer


def write_text_model(
    folder: Path, *, bos: bool = False, template: str | None = CHATML, eos: bool = True
) -> Path:
    """Writes the small files of a model folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": BOS, "eos_token": {"content": END}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    end = tokenizer.token_to_id(END)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end} if eos else {}))
    return folder


def byte_fallback_tokenizer() -> Tokenizer:
    """Returns a tokenizer of words of one letter that writes all others as bytes, as Llama-2's."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "é"]
    vocab = {name: index for index, name in enumerate(names)}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
