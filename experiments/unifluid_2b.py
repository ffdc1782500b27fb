"""Pretraining of a UniFluid on Gemma-2 2B, with the paper's batch of 2048 at 256 px.

    unifluid plan --config=experiments/unifluid_2b.py:topology=v5e_64 --topology=v5e:8x8
    unifluid train --config=experiments/unifluid_2b.py --workdir=runs/unifluid_2b

AdamW at 1e-4, batch 2048 and a million steps are reported of the paper; the paper's lambda is
0.005. The diffusion head, 6 residual blocks of width 1024, the SigLIP tower (So400m/14 at 224 px,
frozen) and all else are our choice. It reads the data set "pairs" of the data folder, which a TFDS
builder of yours has to make, and latents cached from the image tokenizer; docs/launch.md has the
whole way.

Expected: what the step needs on each topology is in docs/plans.md; no such run has been made yet.

Arguments: `topology` ("v5e_64": 8 x 8 chips, "v5e_256": 16 x 16, "v5p_128": 4 x 4 x 4, "v6e_256":
16 x 16, "v6e_256x2": two such slices), `debug` (a CPU minute on easy-vqa).
"""

from ml_collections import ConfigDict

from experiments._pretrain import layout_for, pretrain
from unifluid_jax.config import parse_arg

# Parameters and moments are cut over fsdp, 16 devices; data are replicas of those. Where a side of
# the slice is 16 long, fsdp is that side, and gradients are scattered while they are summed. What
# layers keep (remat) is as much as fits with some memory to spare; on v5e_64 a batch in two parts
# keeps more than one in one piece, and is faster by 5 to 8 %.
LAYOUTS = {
    "v5e_64": {"mesh": (4, 16, 1), "accumulate": 2, "remat": "up"},
    "v5e_256": {"mesh": (16, 16, 1), "accumulate": 1, "remat": "mlp"},
    "v5p_128": {"mesh": (4, 16, 1), "accumulate": 1, "remat": "mlp"},
    "v6e_256": {"mesh": (16, 16, 1), "accumulate": 1, "remat": "mlp"},
    "v6e_256x2": {"mesh": (16, 16, 1), "slices": 2, "accumulate": 1, "remat": "mlp"},
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, topology="v5e_64", debug=False)
    return pretrain(
        "gemma2_2b",
        head=(6, 1024),
        vocab_size=256_128,
        layout=layout_for(arg.topology, LAYOUTS),
        tokenizer="pretrained/tokenizer.gemma",
        debug=arg.debug,
    )
