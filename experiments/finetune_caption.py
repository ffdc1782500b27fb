"""Finetunes a model on captions with LoRA.

    unifluid train --config=experiments/finetune_caption.py --workdir=runs/finetune_caption
    unifluid evaluate --workdir=runs/finetune_caption

With captions of your own: as in finetune_vqa.py, and docs/finetuning.md.

Expected: on easy-vqa's captions, which the quickstart's model has learned, no gain beyond chance
(exact 0.536 after 60 steps, 0.528 before).

Arguments: `base` (workdir of a run or of `unifluid convert`, or an exported model), `data` (name of
a data set), `split` and `test` (of it, to learn and to be scored on), `rank`, `steps`, `debug` (a
CPU minute).
"""

from ml_collections import ConfigDict

from experiments import _finetune


def get_config(arg: str = "") -> ConfigDict:
    arg = _finetune.parse(arg)
    config = _finetune.start(arg.base, arg.rank, arg.steps, arg.debug)
    _finetune.learn(config, "caption", arg.data, arg.split)
    config.input.max_image_targets = 1  # no picture is drawn: the diffusion head has nothing to do
    config.evals.caption = {
        "type": "caption",
        "dataset": arg.data,
        "split": arg.test,
        "limit": 8 if arg.debug else 500,
        "every": 0,
        "pictures": 12,
    }
    return config
