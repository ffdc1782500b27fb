"""Finetunes a model on edits of pictures with LoRA.

    unifluid train --config=experiments/finetune_edit.py --workdir=runs/finetune_edit
    unifluid evaluate --workdir=runs/finetune_edit

With edits of your own: as in finetune_vqa.py, and docs/finetuning.md.

Expected: not measured beyond the first steps; docs/finetuning.md has what finetune_vqa.py gives.

Arguments: `base` (workdir of a run or of `unifluid convert`, or an exported model), `data` (name of
a data set), `split` and `test` (of it, to learn and to be scored on), `rank`, `steps`, `debug` (a
CPU minute).
"""

from ml_collections import ConfigDict

from experiments import _finetune


def get_config(arg: str = "") -> ConfigDict:
    arg = _finetune.parse(arg)
    config = _finetune.start(arg.base, arg.rank, arg.steps, arg.debug)
    # New kinds of pictures ask more of the head than new instructions do.
    config.lora.target += r"|head/blocks/mlp_(in|out)/kernel"
    _finetune.learn(config, "edit", arg.data, arg.split)
    config.input.max_text_targets = 1  # no text is written
    config.evals.edit = {
        "type": "edit",
        "dataset": arg.data,
        "split": arg.test,
        "limit": 8 if arg.debug else 256,
        "every": 0,
        "pictures": 12,
        "judge": arg.data == "easy_vqa",  # whose shapes and colours can be told from pixels
    }
    return config
