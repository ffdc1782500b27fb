"""A config with the goldens' sizes, so that these convert as a user's files do."""

import json
from pathlib import Path

from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"


def backbone(name):
    """`config.model.backbone` of a golden's config.json."""
    c = json.loads((GOLDEN / name / "config.json").read_text())
    c = c.get("text_config", c)
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "mlp_dim": c["intermediate_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "attention": tuple(kinds[x] for x in c["layer_types"])
        if "layer_types" in c
        else ("global",),
        "window": c.get("sliding_window", 4096),
        "query_scale": c["query_pre_attn_scalar"] ** -0.5 if "layer_types" in c else None,
        "attention_cap": c.get("attn_logit_softcapping"),
        "final_cap": c.get("final_logit_softcapping"),
        "post_norms": c["model_type"] != "gemma",
        "qk_norm": c["model_type"] == "gemma3_text",
        "scan_layers": False,
        "dtype": "float32",
    }


def vision(name):
    """`config.model.vision` of a golden's config.json."""
    c = json.loads((GOLDEN / name / "config.json").read_text())["vision_config"]
    return {
        "image_size": c["image_size"],
        "patch_size": c["patch_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_dim": c["intermediate_size"],
        "dtype": "float32",
    }


def golden_config(folder, gemma="paligemma2", siglip="paligemma2"):
    """A config of the sizes of these goldens, its files in `folder`."""
    config = tiny.unifluid(folder).unlock()
    config.model.backbone = backbone(gemma)
    config.model.vision = vision(siglip)
    config.diffusion = {"process": "flow"}
    config.sampling.sampler = {"name": "euler", "steps": 2}
    return config.lock()
