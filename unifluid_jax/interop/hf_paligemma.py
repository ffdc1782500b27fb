"""PaliGemma 1 and 2 as Hugging Face's transformers store them: backbone, SigLIP and projection.

transformers divides the projected features by sqrt(width) and lets Gemma multiply all embeddings
by it again; we, as big_vision, do neither, so the weights are the same.
"""

from unifluid_jax.interop import hf_gemma, hf_siglip
from unifluid_jax.interop.rules import Rule, Table

_TEXT, _VISION = "model.language_model.", "model.vision_tower."

_PROJECTION = (
    Rule("vision_proj/kernel", "model.multi_modal_projector.linear.weight", "D W -> W D"),
    Rule("vision_proj/bias", "model.multi_modal_projector.linear.bias"),
)
# The names of transformers 5 are those of the rules; files on the hub have older ones.
_SPELLINGS = (
    (r"^language_model\.model\.", _TEXT),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", _VISION),
)
_IGNORED = (
    r".*rotary_emb\.inv_freq",
    r".*embeddings\.position_ids",
    r"model\.vision_tower\.head\..*",
)


def _table(name: str, gemma: Table) -> Table:
    text = (
        Rule(
            f"backbone/{rule.ours}",
            _TEXT + rule.theirs.removeprefix("model."),
            rule.form,
            rows=rule.rows,
        )
        for rule in gemma.rules
    )
    rules = (*hf_siglip.TABLE.prefixed("vision/", _VISION), *_PROJECTION, *text)
    return Table(
        name, rules, _SPELLINGS, _IGNORED, {"lm_head.weight": _TEXT + "embed_tokens.weight"}
    )


PALIGEMMA1 = _table("Hugging Face PaliGemma", hf_gemma.GEMMA1)
PALIGEMMA2 = _table("Hugging Face PaliGemma 2", hf_gemma.GEMMA2)
TABLES = (PALIGEMMA1, PALIGEMMA2)

# How files on the hub spell the names, which all versions of transformers read.
HUB_SPELLINGS = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)
