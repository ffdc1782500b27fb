"""Golden numbers: small random models in the layouts of their published files, inputs and outputs.

README.md has the command. Every folder holds a checkpoint as its library writes it and
`golden.npz`, what goes in and what comes out in float32.
"""

import shutil
import sys
from pathlib import Path

import diffusers
import ldm
import mar
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent


def randomise(model, seed):
    """Weights at which every part matters: no bias is zero, no norm is neutral, no softmax flat."""
    rng = np.random.RandomState(seed)
    # Gemma's RMSNorm adds the 1 itself.
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    ones = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.ndim < 2 else p[0].numel() ** -0.5
            if "q_proj.weight" in name or "k_proj.weight" in name:
                scale *= 2.0
            value = scale * rng.standard_normal(p.shape) + (name in ones)
            p.copy_(torch.from_numpy(value.astype(np.float32)))
    return model.eval()


def write(folder, model=None, **arrays):
    """A folder with what `model.save_pretrained` writes, and `golden.npz`."""
    folder = HERE / folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if model is not None:
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {
        name: np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
        for name, x in arrays.items()
    }
    np.savez_compressed(folder / "golden.npz", **arrays)
    return folder


GEMMA = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_implementation": "eager",
    "use_cache": False,
}
# Caps of the published size would be straight lines at logits as small as these.
GEMMA2 = {
    **GEMMA,
    "num_hidden_layers": 5,
    "sliding_window": 4,
    "query_pre_attn_scalar": 6,  # unlike head_dim, as in 27B
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}


def gemmas():
    tokens = torch.from_numpy(np.random.RandomState(1).randint(0, 64, (2, 17)))
    text = [
        ("gemma1", transformers.GemmaConfig(**{**GEMMA, "num_hidden_layers": 3}), "GemmaFor"),
        ("gemma2", transformers.Gemma2Config(**GEMMA2), "Gemma2For"),
        (
            "gemma3",
            transformers.Gemma3TextConfig(
                **{**GEMMA, "num_hidden_layers": 8, "num_key_value_heads": 1},
                sliding_window=4,
                query_pre_attn_scalar=12,
                max_position_embeddings=512,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                    "full_attention": {
                        "rope_type": "linear",
                        "factor": 8.0,
                        "rope_theta": 1_000_000.0,
                    },
                },
            ),
            "Gemma3For",
        ),
    ]
    for seed, (name, config, kind) in enumerate(text, start=10):
        model = randomise(getattr(transformers, f"{kind}CausalLM")(config), seed)
        with torch.no_grad():
            logits = model(tokens).logits
        write(name, model, tokens=tokens, logits=logits)


# 30 pixels in patches of 7: 2 are left over.
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 7,
    "attn_implementation": "eager",
}


def siglip():
    text = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 4,
    }
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    model = randomise(transformers.SiglipModel(config), 20)
    rng = np.random.RandomState(21)
    images, larger, smaller = (
        rng.uniform(-1, 1, (2, 3, side, side)).astype(np.float32) for side in (30, 45, 22)
    )
    tower = model.vision_model

    def features(pixels, **options):
        with torch.no_grad():
            return tower(torch.from_numpy(pixels), **options).last_hidden_state

    write(
        "siglip",
        model,
        images=images,
        features=features(images),
        larger_images=larger,
        larger_features=features(larger, interpolate_pos_encoding=True),
        smaller_images=smaller,
        smaller_features=features(smaller, interpolate_pos_encoding=True),
    )


def paligemmas():
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    texts = {
        "paligemma1": {**GEMMA, "model_type": "gemma", "num_hidden_layers": 2},
        # As published, the window is longer than any sequence.
        "paligemma2": {
            **GEMMA2,
            "model_type": "gemma2",
            "num_hidden_layers": 3,
            "sliding_window": 64,
        },
    }
    for seed, (name, text) in enumerate(texts.items(), start=30):
        config = transformers.PaliGemmaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=62,
            projection_dim=24,
            hidden_size=24,
            attn_implementation="eager",
        )
        model = randomise(transformers.PaliGemmaForConditionalGeneration(config), seed)
        rng = np.random.RandomState(seed)
        images = rng.uniform(-1, 1, (2, 3, 30, 30)).astype(np.float32)
        words = rng.randint(3, 60, (2, 9))
        tokens = np.concatenate([np.full((2, 16), 62), words], axis=1)
        suffix = np.zeros_like(tokens)
        suffix[:, -4:] = 1  # the prefix, picture and prompt, is bidirectional
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(tokens),
                pixel_values=torch.from_numpy(images),
                token_type_ids=torch.from_numpy(suffix),
                attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            ).logits
        write(name, model, images=images, tokens=tokens, suffix=suffix, logits=logits)


def pixels(seed, side):
    """Ramps and noise, NCHW."""
    rng = np.random.RandomState(seed)
    ramp = np.linspace(-1, 1, side)[None, None, None] * rng.uniform(-1, 1, (2, 3, 1, 1))
    return torch.from_numpy((ramp + 0.3 * rng.standard_normal((2, 3, side, side))).astype("f"))


def sd_vae():
    """Stable Diffusion's autoencoder: by diffusers, and the same in latent-diffusion's names."""
    widths = (4, 8, 8, 8)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=24,
        scaling_factor=0.18215,
    )
    model = randomise(model, 40)
    images = pixels(41, 24)
    with torch.no_grad():
        moments = model.encode(images).latent_dist.parameters
        latents = torch.from_numpy(np.random.RandomState(42).standard_normal((2, 4, 3, 3)))
        decoded = model.decode(latents.float()).sample
    golden = {"images": images, "moments": moments, "latents": latents.float(), "decoded": decoded}
    write("sd_vae", model, **golden)

    twin = randomise(ldm.AutoencoderKL(4, (1, 2, 2, 2), 2, 2, 4), 43)
    with torch.no_grad():
        golden |= {"moments": twin.moments(images), "decoded": twin.decode(latents.float())}
    folder = write("sd_vae_ldm", **golden)
    weights = {f"first_stage_model.{name}": x for name, x in twin.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 1}, folder / "model.ckpt")


def mar_kl16():
    model = ldm.AutoencoderKL(4, (1, 1, 2, 2, 2), 2, 2, 16, encoder_attention=(4,))
    model = randomise(model, 50)
    images = pixels(51, 48)
    latents = torch.from_numpy(np.random.RandomState(52).standard_normal((2, 16, 3, 3))).float()
    with torch.no_grad():
        moments, decoded = model.moments(images), model.decode(latents)
    folder = write("mar_kl16", images=images, moments=moments, latents=latents, decoded=decoded)
    torch.save({"model": model.state_dict()}, folder / "kl16.ckpt")


def mar_head():
    dim, condition, width = 6, 10, 32
    torch.manual_seed(60)
    head, chain = mar.Head(dim, condition, width, depth=2), mar.Chain()
    mix = torch.randn(condition, dim) / condition**0.5

    def draw(count=256):
        z = torch.randn(count, condition)
        return z @ mix + 0.3 * torch.randn(count, dim), z

    print("mar_head: loss after training", mar.train(head, chain, draw, steps=1500, seed=61))
    torch.manual_seed(62)
    # Both ends of the chain, and tokens beyond the range of pixels.
    t = torch.tensor([0] * 8 + [1, 2, 3, 996, 997, 998, 999, 999] + list(range(10, 1000, 62)))
    x, z = draw(len(t))
    noise = torch.randn_like(x)
    with torch.no_grad():
        squared, bits = mar.losses(chain, head, x, t, noise, z)
    z_sample, z_null = torch.randn(4, condition), torch.zeros(4, condition)
    sample_noise = torch.randn(101, 4, dim)
    guidance, temperature = 2.5, 0.9
    sample = mar.sample(head, z_sample, z_null, sample_noise, guidance, temperature)
    folder = write(
        "mar_head",
        x=x,
        t=t.int(),
        noise=noise,
        z=z,
        squared=squared,
        bits=bits,
        sample_z=z_sample,
        sample_z_null=z_null,
        sample_noise=sample_noise,
        guidance=np.float32(guidance),
        temperature=np.float32(temperature),
        sample=sample,
    )
    weights = {f"diffloss.net.{name}": p.contiguous() for name, p in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


ALL = {f.__name__: f for f in (gemmas, siglip, paligemmas, sd_vae, mar_kl16, mar_head)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ALL:
        ALL[name]()
