"""unifluid-small, the model that the package ships: the quickstart's two hours, and as long again.

    unifluid data build easy_vqa easy_vqa_recolored openmoji
    unifluid train --config=experiments/quickstart.py:steps=20000 --workdir=runs/two_hours
    unifluid train --config=experiments/unifluid_small.py --workdir=runs/unifluid_small
    unifluid evaluate --workdir=runs/unifluid_small
    unifluid convert --checkpoint=runs/unifluid_small --to=unifluid --out=unifluid-small

The second training goes on from the first with what a longer one needs: four times the pictures,
so that none is known by heart; prompts with words left out, so that colours and shapes are learned
apart and combine as training has never shown them; and groups of up to eight image tokens.

Expected: 80 minutes on two cores; the card of the model has the scores.

Arguments: `steps`, `debug` (a CPU minute).
"""

from ml_collections import ConfigDict

from experiments import quickstart
from unifluid_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, steps=16_000, debug=False)
    config = quickstart.get_config(f"steps={arg.steps}{',debug' if arg.debug else ''}")
    config.init_from = "" if arg.debug else "runs/two_hours"
    config.optim.lr = 6e-3  # the weights are good ones
    config.train.ema_decay = 0.999
    config.input.word_drop = 0.1
    config.input.parallel = (1, 1, 1, 1, 2, 2, 4, 8)  # most often few at once
    config.input.mixture = tuple(
        {"dataset": dataset, "split": "train", "task": task, "weight": weight}
        for dataset, task, weight in (
            # Reading is learned, and kept.
            ("easy_vqa", "caption", 0.1),
            ("easy_vqa", "vqa", 0.4),
            ("easy_vqa", "generate", 1.2),
            ("easy_vqa_recolored", "generate", 2.8),
            ("easy_vqa", "edit", 0.7),
            ("openmoji", "caption", 0.1),
            ("openmoji", "vqa", 0.05),
            ("openmoji", "generate", 0.7),
            ("openmoji", "edit", 0.1),
        )
    )
    return config
