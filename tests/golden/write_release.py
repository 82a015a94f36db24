"""Writes tiny checkpoints as the releases of the environment that runs it save them.

    python tests/golden/write_release.py FOLDER

`make_releases.py` calls it in an environment for each release; nothing of this project
is imported. Weights are a function of their names and places (`drawn`), which the tests
compute too, and which compresses. `ids.json` beside a tokenizer holds the ids of
`TEXTS` by the library's own class.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

WORDS = ("photo", "cat", "of", "the")
TOKENS = ("<my-cat>", "<my-cat>_1")  # as textual inversion adds one of two vectors
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXTS = (
    "",
    "a photo of the cat",
    "A Photo of THE Cat!",
    "a photo of <my-cat> <my-cat>_1",
    "<my-cat>",
    "the<my-cat>of",
    "<MY-CAT>",
    "a <|endoftext|> in the text",
    "<|startoftext|>cat",
    "two\nlines and\ta tab",
    "  spaces   around  ",
    "it's the cat's, isn't it? I'll, they've, we'd",
    "1234 5.5 mm M2.5",
    "naïve café, Ångström",
    "cafe\u0301",  # e and an accent
    "straße İstanbul ŒUVRE",
    "日本語の写真",
    "中文 照片, 猫",
    "고양이 사진",
    "बिल्ली की तस्वीर",
    "รูปแมว",
    "صورة قطة",
    "חתול",
    "фото кошки",
    "😀🐈‍⬛👩‍👩‍👧",
    "a photo — of “the” cat…",
    "\u00a0no-break\u2003spaces\u200b",
    "C++ & <b>html</b> &amp; #tag @you",
    "half ½ ² ﬁ Ａ",
    "x" * 90,
)


def drawn(name: str, shape: tuple) -> np.ndarray:
    """fp32 in steps of 1/128, of period 97; large arrays have one value."""
    size, start = int(np.prod(shape)), zlib.crc32(name.encode()) % 97
    places = np.arange(size) if size <= 1 << 16 else np.zeros(size, int)
    return ((((start + places) % 97) - 48) / 128).astype(np.float32).reshape(shape)


def vocabulary() -> tuple:
    """CLIP's form: every byte twice, merges of the `WORDS`, BOS and EOS."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = [chr(b) for b in shown] + [chr(256 + n) for n in range(len(hidden))]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def redraw(path: pathlib.Path) -> None:
    """Replaces the numbers in a file, and nothing else."""
    import safetensors
    import safetensors.numpy

    with safetensors.safe_open(str(path), "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(str(path))
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32:
            # transformers 5 has no prefix in a text encoder.
            tensors[name] = drawn(name.removeprefix("text_model."), tensor.shape)
    safetensors.numpy.save_file(tensors, str(path), metadata)


def clip_tokenizer(folder: pathlib.Path):
    import transformers

    folder.mkdir(parents=True)
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.add_tokens(list(TOKENS))
    return tokenizer


def write_ids(folder: pathlib.Path) -> None:
    import transformers

    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(folder))
    ids = [tokenizer(text, max_length=77, truncation=True) for text in TEXTS]
    (folder / "ids.json").write_text(json.dumps([row["input_ids"] for row in ids]))


def stable_diffusion(folder: pathlib.Path, tokenizer) -> None:
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(
        sample_size=2,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=2,
        sample_size=8,
    )
    vocab, _ = vocabulary()
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=vocab[BOS],
            eos_token_id=vocab[EOS],
            pad_token_id=vocab[EOS],
        )
    )
    text.resize_token_embeddings(len(tokenizer))
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, **noise
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder), safe_serialization=True)
    write_ids(folder / "tokenizer")
    control = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16, 32)
    )
    control.save_pretrained(str(folder / "controlnet"), safe_serialization=True)


def clip(folder: pathlib.Path, tokenizer) -> None:
    import transformers

    vocab, _ = vocabulary()
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
    }
    config = transformers.CLIPConfig(
        text_config=shared | text,
        vision_config=shared | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_mean=[0.5, 0.25, 0.125],  # not CLIP's
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(str(folder))
    write_ids(folder)
    tower = transformers.CLIPVisionModelWithProjection(model.config.vision_config)
    tower.save_pretrained(str(folder / "tower"), safe_serialization=True)
    images.save_pretrained(str(folder / "tower"))


def vit_gpt2(folder: pathlib.Path) -> None:
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a photo of the cat"] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=sorted(alphabet),
            special_tokens=[EOS],
            show_progress=False,
        ),
    )
    written = folder / "bpe.json"
    folder.mkdir(parents=True)
    bpe.save(str(written))
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(written), **marks
    )
    written.unlink()
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        ),
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=0,
    )
    model = transformers.VisionEncoderDecoderModel(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def blip2(folder: pathlib.Path) -> None:
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(["a photo of the cat"] * 4, trainer)
    folder.mkdir(parents=True)
    written = folder / "bpe.json"
    bpe.save(str(written))
    marks = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(written), **marks
    )
    written.unlink()
    images = transformers.BlipImageProcessor(size={"height": 8, "width": 8})
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        "model_type": "opt",
        "vocab_size": len(tokenizer) + 8,  # padded, as OPT's
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = transformers.Blip2Config(
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        qformer_config={
            **tower,
            "vocab_size": 8,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 16,
        },
        text_config=text,
        num_query_tokens=4,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    processor = transformers.Blip2Processor(images, tokenizer)
    processor.save_pretrained(str(folder))


def classifiers(folder: pathlib.Path) -> None:
    import timm
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    )
    config.num_labels = 3
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(str(folder / "transformers"), safe_serialization=True)
    processor = transformers.ViTImageProcessor(size={"height": 36, "width": 36})
    processor.save_pretrained(str(folder / "transformers"))
    for name in ("resnet18", "efficientnet_b0"):
        model = timm.create_model(name, num_classes=3)
        timm.models._hub.save_for_hf(model, str(folder / name), safe_serialization=True)


def adapters(folder: pathlib.Path) -> None:
    """LoRA of a UNet: by peft, and the file of diffusers."""
    import diffusers
    import peft

    unet = diffusers.UNet2DConditionModel(
        sample_size=2,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"])
    if hasattr(unet, "add_adapter"):
        unet.add_adapter(config)
        layers = peft.get_peft_model_state_dict(unet)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            str(folder / "diffusers"), unet_lora_layers=layers
        )
        unet.delete_adapters("default")
    else:
        from diffusers.models.attention_processor import LoRAAttnProcessor

        unet.set_attn_processor(
            {
                name: LoRAAttnProcessor(32, 16 if "attn2" in name else None, rank=2)
                for name in unet.attn_processors
            }
        )
        unet.save_attn_procs(str(folder / "diffusers"), safe_serialization=True)
        unet.set_default_attn_processor()
    wrapped = peft.get_peft_model(unet, config)
    wrapped.save_pretrained(str(folder / "peft"), safe_serialization=True)


def declare_operators() -> None:
    """torchvision imports with a PyTorch that its operators are not compiled for."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    align = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    backward = [f"_{name}_backward" for name in align]
    for name in ("nms", "qnms", *align, *backward):
        library.define(f"{name}(Tensor x) -> Tensor")
    declare_operators.library = library  # its end would remove them


def main() -> None:
    declare_operators()
    folder = pathlib.Path(sys.argv[1])
    tokenizer = clip_tokenizer(folder / "scratch")
    stable_diffusion(folder / "stable_diffusion", tokenizer)
    clip(folder / "clip", tokenizer)
    vit_gpt2(folder / "vit_gpt2")
    blip2(folder / "blip2")
    classifiers(folder / "classifiers")
    adapters(folder / "adapters")
    for file in folder.rglob("*.safetensors"):
        redraw(file)
    for file in (folder / "scratch").iterdir():
        file.unlink()
    (folder / "scratch").rmdir()


if __name__ == "__main__":
    main()
