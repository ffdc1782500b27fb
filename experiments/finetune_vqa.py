"""Finetunes a model on visual questions with LoRA.

    unifluid train --config=experiments/finetune_vqa.py --workdir=runs/finetune_vqa
    unifluid evaluate --workdir=runs/finetune_vqa

On a folder of your own pictures, questions and answers:

    unifluid data import my_pictures
    unifluid train --config=experiments/finetune_vqa.py:data=my_pictures --workdir=runs/my_questions

Expected: on a question that the quickstart's model has not learned, accuracy 0.448 after 60 steps
(before: 0); on easy-vqa's own, which it has learned, no gain. docs/finetuning.md says more.

Arguments: `base` (workdir of a run or of `unifluid convert`, or an exported model), `data` (name of
a data set), `split` and `test` (of it, to learn and to be scored on), `rank`, `steps`, `debug` (a
CPU minute).
"""

from ml_collections import ConfigDict

from experiments import _finetune


def get_config(arg: str = "") -> ConfigDict:
    arg = _finetune.parse(arg)
    config = _finetune.start(arg.base, arg.rank, arg.steps, arg.debug)
    _finetune.learn(config, "vqa", arg.data, arg.split)
    config.input.max_image_targets = 1  # no picture is drawn: the diffusion head has nothing to do
    config.evals.vqa = {
        "type": "vqa",
        "dataset": arg.data,
        "split": arg.test,
        "limit": 8 if arg.debug else 1000,
        "every": 0,
        "pictures": 12,
    }
    return config
