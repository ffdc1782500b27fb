"""SigLIP's vision tower as Hugging Face's transformers store it.

Keys come with and without "vision_model." (transformers 5 dropped it). The text tower, the pooling
head and the two scalars of the contrastive loss have no place in UniFluid.

The letters p and q (height and width of a patch) and C (3 channels) are sizes that the caller
gives: our patch embedding is one matrix.
"""

from unifluid_jax.interop.rules import Rule, Table

_LAYER = "encoder.layers.{layer}."


def _attention() -> tuple[Rule, ...]:
    rules = []
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = f"{_LAYER}self_attn.{theirs}."
        rules.append(Rule(f"blocks/{ours}/kernel", name + "weight", "(H K) W -> W H K"))
        rules.append(Rule(f"blocks/{ours}/bias", name + "bias", "(H K) -> H K"))
    name = f"{_LAYER}self_attn.out_proj."
    rules.append(Rule("blocks/attention_out/kernel", name + "weight", "W (H K) -> H K W"))
    rules.append(Rule("blocks/attention_out/bias", name + "bias"))
    return tuple(rules)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", "O I -> I O"),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


TABLE = Table(
    "Hugging Face SigLIP",
    (
        Rule("patch_in/kernel", "embeddings.patch_embedding.weight", "W C p q -> (p q C) W"),
        Rule("patch_in/bias", "embeddings.patch_embedding.bias"),
        Rule("positions", "embeddings.position_embedding.weight"),
        *_norm("blocks/attention_norm", _LAYER + "layer_norm1"),
        *_attention(),
        *_norm("blocks/mlp_norm", _LAYER + "layer_norm2"),
        *_linear("blocks/mlp_in", _LAYER + "mlp.fc1"),
        *_linear("blocks/mlp_out", _LAYER + "mlp.fc2"),
        *_norm("final_norm", "post_layernorm"),
    ),
    spellings=((r"^vision_model\.", ""),),
    ignored=(
        r"text_model\..*",
        r"head\..*",
        r"logit_(scale|bias)",
        r".*embeddings\.position_ids",
    ),
)
TABLES = (TABLE,)

# How files on the hub spell the names, which all versions of transformers read.
HUB_SPELLINGS = ((r"^", "vision_model."),)
